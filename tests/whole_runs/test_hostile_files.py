"""What strangers may have put where the trainer looks.

Run folders that were spoilt, checkpoints made to do harm, names that are markup.
"""

import json
import os
from pathlib import Path

import forked_runs
import pytest
import torch
from conftest import contents, rows, sha256, summary
from PIL import Image

from cifar_accel.records import checkpoint


@pytest.fixture
def trained(words, tmp_path):
    """The options of a small run, and its folder."""
    options = words("--run-name", "a", "--tracker", "none", "--max-steps", "8")
    forked_runs.finish(options, tmp_path / "log")
    return options, tmp_path / "ck" / "a"


# ---- names


def test_names_that_are_markup_do_nothing(tmp_path, cache, in_process):
    """Classes called like a script and with control characters: trained on, and shown as text."""
    from cifar_accel.cli import main, train_command

    data = tmp_path / "data"
    for split in ("train", "test"):
        for i, name in enumerate(("<script>alert(1)<_script>", "a\x1b[31mb\x07")):
            (data / split / name).mkdir(parents=True)
            for n in range(4):
                image = Image.new("RGB", (32, 32), (40 * n, 120 * i, 7))
                image.save(data / split / name / f"{n}.png")
    options = ["--dataset", data, "--model", "test_nfnet", "--no-pretrained", "--recipe", "plain"]
    options += ["--batch-size", "4", "--epochs", "1", "--tracker", "none", "--data-dir", cache]

    code, out, err = in_process(train_command, *options, "--save-dir", tmp_path / "ck")
    assert code == 0, err
    assert "\x1b[31m" not in out + err

    code, out, _ = in_process(main, "report", tmp_path / "ck")
    assert code == 0
    assert "\x1b[31m" not in out
    page = (tmp_path / "ck" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert "\x07" not in page


# ---- run folders


def replaced(**changes):
    """Spoils config.json: other values of its members."""
    return lambda text: json.dumps(json.loads(text) | changes)


def replaced_options(**changes):
    """Spoils config.json: other values of its options."""

    def spoil(text):
        config = json.loads(text)
        config["options"] |= changes
        return json.dumps(config)

    return spoil


# What may have become of a run's config.json.
SPOILT = {
    "missing": None,
    "empty": lambda text: "",
    "cut short": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "a number": lambda text: "1",
    "options that are a list": replaced(options=[]),
    "no provenance": replaced(provenance=None),
    "a command that is a number": replaced(command=1),
    "a command of numbers": replaced(command=[1, 2]),
    "starts that are a number": replaced(resumed=1),
    "a model that is a number": replaced_options(model=1),
    "a mean of two channels": replaced_options(input_mean=[0, 0]),
    "no classes": replaced_options(classes=None),
}


def test_a_run_that_has_lost_its_config_is_not_trained_over(trained, in_process):
    """Nobody knows which run it is.

    It is neither continued nor begun anew, and the other commands pass it by.
    """
    from cifar_accel.cli import main, train_command

    words, run = trained
    refusals = [
        (train_command, words, "no config.json that says which; give another --run-name"),
        (main, ["evaluate", run], "is no run folder"),
        (main, ["report", run.parent], "no run folder"),
    ]
    text = (run / "config.json").read_text()
    for how, spoil in SPOILT.items():
        (run / "config.json").unlink(missing_ok=True)
        if spoil:
            (run / "config.json").write_text(spoil(text))
        before = contents(run)
        for command, options, message in refusals:
            code, _, err = in_process(command, *options)
            assert code == 2, how
            assert message in err, how
            assert err.count("\n") == 1, how
        assert contents(run) == before, how


def test_a_damaged_model_is_one_line(trained, in_process):
    from cifar_accel.cli import main

    _, run = trained
    weights = (run / "model" / "model.safetensors").read_bytes()
    damage = {"model.safetensors": weights[:-1000], "config.json": b"{}"}
    for name, content in damage.items():
        whole = (run / "model" / name).read_bytes()
        (run / "model" / name).write_bytes(content)
        code, _, err = in_process(main, "evaluate", run)
        assert code == 2
        assert "cannot be read as a model" in err
        assert err.count("\n") == 1
        (run / "model" / name).write_bytes(whole)

    code, _, err = in_process(main, "evaluate", run, "--batch-size", "-1")
    assert code == 2
    assert "--batch-size -1" in err
    code, _, _ = in_process(main, "evaluate", run)
    assert code == 0


def test_a_spoilt_summary_does_no_harm(trained, in_process):
    from cifar_accel.cli import main, train_command

    words, run = trained
    for text in ("", "[]", '{"status": "finished"}', '{"status": "finished", "steps": "x"}'):
        (run / "summary.json").write_text(text)
        code, out, err = in_process(main, "report", run.parent)
        assert code == 0
        assert "Not finished" in out
        assert not err
    code, out, err = in_process(train_command, *words)
    assert code == 0
    assert "after step 8" in out
    assert summary(run)["status"] == "finished"


# ---- checkpoints


def test_checkpoints_that_name_paths_elsewhere_do_nothing(trained, words, tmp_path):
    run = trained[1]
    manifest_file = run / "checkpoints" / "step-00000008" / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    (tmp_path / "victim").write_text("mine")
    manifest["files"]["../../../../victim"] = {"bytes": 4, "sha256": "0"}
    manifest_file.write_text(json.dumps(manifest))

    options = words("--run-name", "a", "--tracker", "none", "--max-steps", "9")
    forked_runs.finish(options, tmp_path / "log")
    assert "names a file outside the folder" in (tmp_path / "log").read_text()
    assert (tmp_path / "victim").read_text() == "mine"
    assert len(sha256(run)) == 64


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def pickled(value):
    return lambda file: torch.save(value, file)


def written(text):
    return lambda file: file.write_text(text)


def state_with(**changes):
    """Spoils state.json: other values of its members."""
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


TEXTS = {"loss": "1", "correct": "2", "images": "3"}

# What somebody else may have put into a checkpoint whose manifest is right.
FOREIGN = {
    "a pickle that runs a command": ("optimizer.pt", pickled(Hostile("touch hostile-was-here"))),
    "an optimizer that is a list": ("optimizer.pt", pickled([1])),
    "an optimizer without its groups": (
        "optimizer.pt",
        pickled({"state": {}, "param_groups": []}),
    ),
    "weights that are no safetensors": ("model.safetensors", written("nothing")),
    "a state that is a list": ("state.json", written("[]")),
    "a state that is no JSON": ("state.json", written("{")),
    "a step that is text": ("state.json", state_with(step="8")),
    "a step below 0": ("state.json", state_with(step=-8)),
    "a step behind the last": ("state.json", state_with(step=10**9)),
    "a window of another length": ("state.json", state_with(window=[0.0] * 3)),
    "a window of text": ("state.json", state_with(window=TEXTS)),
    "an epoch of text": ("state.json", state_with(epoch=TEXTS)),
    "a gradient norm that is text": ("state.json", state_with(gradient_norm="1")),
    "an evaluation that is a number": ("state.json", state_with(evaluation=1)),
    "a fingerprint that is a number": ("state.json", state_with(data=1)),
}


def test_what_a_stranger_put_into_a_checkpoint_is_one_line(trained, words, tmp_path):
    """Its manifest is right: sizes and SHA-256 only say that nothing was damaged."""
    run = trained[1]
    folder = run / "checkpoints" / "step-00000008"
    options = words("--run-name", "a", "--tracker", "none")
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    for n, (what, (name, change)) in enumerate(FOREIGN.items()):
        change(folder / name)
        manifest = json.loads(good["manifest.json"])
        manifest["files"][name] = {
            "bytes": (folder / name).stat().st_size,
            "sha256": checkpoint.sha256(folder / name),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert checkpoint.fault(folder) is None

        before = rows(run)
        log = tmp_path / f"log-{n}"
        refused = forked_runs.finish(options, log)
        said = log.read_text()
        assert refused.codes == [2], what
        assert "Traceback" not in said, what
        assert said.count("cifar_accel: --resume ") == 1, what
        assert rows(run) == before, what
        assert not list(Path.cwd().glob("hostile-*")), what
        for file, content in good.items():
            (folder / file).write_bytes(content)

    # Without what the stranger put there, it goes on.
    assert forked_runs.finish(options, tmp_path / "log").codes == [0]
