"""What strangers may have put where the trainer looks: spoilt run folders, hostile checkpoints, markup in names."""

import json
import os
from pathlib import Path

import forked_runs
import pytest
import torch
from conftest import contents, rows, sha256, summary

from cifar_accel.records import checkpoint


@pytest.fixture
def trained(words, tmp_path):
    """The options of a small run, and its folder."""
    options = words("--run-name", "a", "--tracker", "none", "--max-steps", "8")
    forked_runs.finish(options, tmp_path / "log")
    return options, tmp_path / "ck" / "a"


def test_names_that_are_markup_do_nothing(tmp_path, cache, in_process):
    """A class called like a script and one with control characters: trained on, reported, and shown as text."""
    from PIL import Image

    from cifar_accel.cli import main, train_command

    for split in ("train", "test"):
        for i, name in enumerate(("<script>alert(1)<_script>", "a\x1b[31mb\x07")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for n in range(4):
                image = Image.new("RGB", (32, 32), (40 * n, 120 * i, 7))
                image.save(tmp_path / "data" / split / name / f"{n}.png")
    options = [
        "--dataset",
        tmp_path / "data",
        "--model",
        "test_nfnet",
        "--no-pretrained",
        "--recipe",
        "plain",
    ]
    options += ["--batch-size", "4", "--epochs", "1", "--tracker", "none", "--data-dir", cache]
    code, out, err = in_process(train_command, *options, "--save-dir", tmp_path / "ck")
    assert code == 0 and "\x1b[31m" not in out + err, err
    code, out, _ = in_process(main, "report", tmp_path / "ck")
    assert code == 0 and "\x1b[31m" not in out
    page = (tmp_path / "ck" / "report.html").read_text()
    assert "<script>alert" not in page and "\x1b" not in page and "\x07" not in page


def test_checkpoints_that_name_paths_elsewhere_do_nothing(trained, words, tmp_path):
    run = trained[1]
    manifest = run / "checkpoints" / "step-00000008" / "manifest.json"
    about = json.loads(manifest.read_text())
    (tmp_path / "victim").write_text("mine")
    about["files"]["../../../../victim"] = {"bytes": 4, "sha256": "0"}
    manifest.write_text(json.dumps(about))
    forked_runs.finish(
        words("--run-name", "a", "--tracker", "none", "--max-steps", "9"), tmp_path / "log"
    )
    assert "names a file outside the folder" in (tmp_path / "log").read_text()
    assert (tmp_path / "victim").read_text() == "mine" and len(sha256(run)) == 64


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def _state(**changes):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _options(**changes):
    return lambda text: json.dumps(
        json.loads(text) | {"options": json.loads(text)["options"] | changes}
    )


# What may have become of a run's config.json.
SPOILT = {
    "missing": None,
    "empty": lambda text: "",
    "cut short": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "a number": lambda text: "1",
    "options that are a list": lambda text: json.dumps(json.loads(text) | {"options": []}),
    "no provenance": lambda text: json.dumps(json.loads(text) | {"provenance": None}),
    "a command that is a number": lambda text: json.dumps(json.loads(text) | {"command": 1}),
    "a command of numbers": lambda text: json.dumps(json.loads(text) | {"command": [1, 2]}),
    "starts that are a number": lambda text: json.dumps(json.loads(text) | {"resumed": 1}),
    "a model that is a number": _options(model=1),
    "a mean of two channels": _options(input_mean=[0, 0]),
    "no classes": _options(classes=None),
}


def test_a_run_that_has_lost_its_config_is_not_trained_over(trained, in_process):
    """Nobody knows which run it is: it is neither continued nor begun anew, and the other commands pass it by."""
    from cifar_accel.cli import main, train_command

    words, run = trained
    text = (run / "config.json").read_text()
    for how, spoil in SPOILT.items():
        (run / "config.json").unlink(missing_ok=True)
        if spoil:
            (run / "config.json").write_text(spoil(text))
        before = contents(run)
        for command, options, message in (
            (
                train_command,
                words,
                "no config.json that says which; give another --run-name, or --resume never",
            ),
            (main, ["evaluate", run], "is no run folder"),
            (main, ["report", run.parent], "no run folder"),
        ):
            code, _, err = in_process(command, *options)
            assert code == 2 and message in err and err.count("\n") == 1, how
        assert contents(run) == before, how


def test_a_damaged_model_is_one_line(trained, in_process):
    from cifar_accel.cli import main

    _, run = trained
    whole = {
        name: (run / "model" / name).read_bytes() for name in ("model.safetensors", "config.json")
    }
    for name, content in (
        ("model.safetensors", whole["model.safetensors"][:-1000]),
        ("config.json", b"{}"),
    ):
        (run / "model" / name).write_bytes(content)
        code, _, err = in_process(main, "evaluate", run)
        assert code == 2 and "cannot be read as a model" in err and err.count("\n") == 1
        (run / "model" / name).write_bytes(whole[name])
    code, _, err = in_process(main, "evaluate", run, "--batch-size", "-1")
    assert code == 2 and "--batch-size -1" in err
    assert in_process(main, "evaluate", run)[0] == 0


def test_a_spoilt_summary_does_no_harm(trained, in_process):
    from cifar_accel.cli import main, train_command

    words, run = trained
    for text in ("", "[]", '{"status": "finished"}', '{"status": "finished", "steps": "x"}'):
        (run / "summary.json").write_text(text)
        code, out, err = in_process(main, "report", run.parent)
        assert code == 0 and "Not finished" in out and not err
    code, out, err = in_process(train_command, *words)
    assert code == 0 and "after step 8" in out and summary(run)["status"] == "finished"


# What somebody else may have put into a checkpoint whose manifest is right.
FOREIGN = {
    "a pickle that runs a command": (
        "optimizer.pt",
        lambda f: torch.save(Hostile("touch hostile-was-here"), f),
    ),
    "an optimizer that is a list": ("optimizer.pt", lambda f: torch.save([1], f)),
    "an optimizer without its groups": (
        "optimizer.pt",
        lambda f: torch.save({"state": {}, "param_groups": []}, f),
    ),
    "weights that are no safetensors": ("model.safetensors", lambda f: f.write_bytes(b"nothing")),
    "a state that is a list": ("state.json", lambda f: f.write_text("[]")),
    "a state that is no JSON": ("state.json", lambda f: f.write_text("{")),
    "a step that is text": ("state.json", _state(step="8")),
    "a step below 0": ("state.json", _state(step=-8)),
    "a step behind the last": ("state.json", _state(step=10**9)),
    "an unknown entry": ("state.json", _state(__class__="x")),
    "a window that is too short for its sums": ("state.json", _state(window={})),
    "an epoch of text": ("state.json", _state(epoch=["1", "2", "3"])),
    "a flag that is text": ("state.json", _state(due="no")),
    "an evaluation that is a number": ("state.json", _state(evaluation=1)),
}


def test_what_a_stranger_put_into_a_checkpoint_is_one_line(trained, words, tmp_path):
    """Its manifest is right: sizes and SHA-256 only say that nothing was damaged."""
    run = trained[1]
    folder = run / "checkpoints" / "step-00000008"
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    for n, (what, (name, change)) in enumerate(FOREIGN.items()):
        change(folder / name)
        about = json.loads(good["manifest.json"])
        about["files"][name] = {
            "bytes": (folder / name).stat().st_size,
            "sha256": checkpoint.sha256(folder / name),
        }
        (folder / "manifest.json").write_text(json.dumps(about))
        assert checkpoint.fault(folder) is None
        log, before = tmp_path / f"log-{n}", rows(run)
        refused = forked_runs.finish(words("--run-name", "a", "--tracker", "none"), log)
        said = log.read_text()
        assert (
            refused.codes == [2]
            and "Traceback" not in said
            and said.count("cifar_accel: --resume ") == 1
        ), what
        assert rows(run) == before and not list(Path.cwd().glob("hostile-*")), what
        for file, content in good.items():
            (folder / file).write_bytes(content)
    assert forked_runs.finish(
        words("--run-name", "a", "--tracker", "none"), tmp_path / "log"
    ).codes == [0]
