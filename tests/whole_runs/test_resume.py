"""How a run is stopped, killed and continued, in real processes."""

import json
import math
import shutil
import signal
import subprocess

import forked_runs
import pytest
import timm
from conftest import (
    ROOT,
    contents,
    files_of,
    heed_signals,
    image_folder,
    rows,
    sha256,
    steps,
    summary,
    wait_for,
    wandb_runs,
    wandb_summary,
    without_clock,
)
from safetensors.torch import save_file

from cifar_accel.cli import train_command
from cifar_accel.files import read_json, write_json
from cifar_accel.files import sha256 as sha256_of
from cifar_accel.records.predictions import read_predictions

# A run in the folder ck/a of the test.
RUN_A = "--run-name a --tracker none".split()

# Where run folders of earlier versions are kept, and the command that most of them are runs of.
STORED = ROOT / "tests" / "records"
TINY_VIT = (
    "--model test_vit --no-pretrained --recipe digits --limit-test 100 --batch-size 32 --epochs 2 "
    "--learning-rate 3e-3 --log-every 2 --tracker none "
    "--model-kwargs embed_dim=8 depth=1 num_heads=1 patch_size=16"
).split()


# ---- killed


def test_a_damaged_newest_checkpoint_is_passed_over(trainer):
    words = [*RUN_A, "--epochs", "3"]
    run = trainer(*words).run
    digest = sha256(run)

    # As if killed after the last checkpoint, of which the disk has lost a few bytes.
    (run / "summary.json").unlink()
    weights = run / "checkpoints" / "step-00000024" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)

    looked = trainer(*words, "--dry-run")
    assert "step-00000016" in looked.stdout
    assert "step-00000024 is passed over" in looked.stdout
    done = trainer(*words)
    assert "step-00000024 is passed over" in done.stdout
    assert "after step 16" in done.stdout
    assert sha256(run) == digest


def test_metrics_with_rubbish_go_on(trainer):
    run = trainer(*RUN_A, "--max-steps", "8").run
    good = rows(run)
    rubbish = [
        b"\xff\xfe",
        b'{"step": "5"}',
        b'{"step": null}',
        b"[1]",
        b'{"step": 1, "epoch": "x"}',
        b"nothing",
    ]
    with open(run / "metrics.jsonl", "ab") as f:
        f.writelines(line + b"\n" for line in rubbish)
    trainer(*RUN_A)

    # The row of the checkpoint's own step is settled, and logged, once more.
    after = rows(run)[: len(good)]
    assert after[:-1] == good[:-1]
    assert without_clock(after) == without_clock(good)
    assert steps(run)[-1] == 32


# ---- stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_143(trainer, tmp_path, number):
    words = "--epochs 16 --run-name stopped".split()
    run = tmp_path / "ck" / "stopped"
    process = subprocess.Popen(trainer.command(*words), stdout=subprocess.PIPE, text=True)
    wait_for((run / "metrics.jsonl").exists)
    process.send_signal(number)
    assert process.wait(30) == 143
    assert signal.Signals(number).name in (run / "PREEMPTED").read_text()
    assert summary(run)["status"] == "preempted"
    stopped_at = summary(run)["steps"]
    assert (run / "checkpoints" / f"step-{stopped_at:08d}").is_dir()

    done = trainer(*words)
    assert f"after step {stopped_at}" in done.stdout
    assert not (run / "PREEMPTED").exists()
    assert summary(run)["status"] == "finished"

    # Two parts of one wandb run.
    first, second = wandb_runs(run)
    assert first.name == second.name
    assert wandb_summary(second)["summary"]["test/accuracy"] == summary(run)["accuracy"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_stopped_while_the_libraries_are_loaded(trainer, tmp_path, number):
    process = subprocess.Popen(
        trainer.command(),
        preexec_fn=heed_signals,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("loading torch")
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert not (tmp_path / "ck").exists()


def test_stopped_before_the_first_step(trainer, tmp_path):
    """While data and model are made there is nothing to save: it ends at once, leaving nothing."""
    process = subprocess.Popen(
        trainer.command("--run-name", "a"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not process.stdout.readline().startswith("model: making"):
        assert process.poll() is None, "it ended before it made the model"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert not (tmp_path / "ck").exists()


# ---- --max-steps and --resume


def test_max_steps_cuts_and_a_larger_one_goes_on(trainer):
    whole = trainer("--run-name", "whole", "--tracker", "none").run
    # Step 26 is in the last epoch.
    cut = trainer(*RUN_A, "--max-steps", "26").run
    assert summary(cut)["steps"] == 26
    assert steps(cut)[-1] == 26

    cut = trainer(*RUN_A).run
    assert sha256(cut) == sha256(whole)
    assert summary(cut)["train_loss"] == summary(whole)["train_loss"]

    # The schedule was never that of a shorter run.
    def rates_of_step_27(run):
        return [row["train/lr"] for row in rows(run) if row["step"] == 27]

    assert rates_of_step_27(cut) == rates_of_step_27(whole)


def test_a_resume_does_not_need_the_starting_weights_again(trainer, tmp_path):
    source = trainer(*"--epochs 1 --tracker none --run-name source".split()).run
    weights = tmp_path / "start.safetensors"
    shutil.copy(source / "model" / "model.safetensors", weights)
    words = [*RUN_A, "--checkpoint", str(weights)]
    trainer(*words, "--max-steps", "8")
    weights.unlink()
    assert "after step 8" in trainer(*words, "--max-steps", "9").stdout


def test_resume_never_and_resume_path(trainer):
    words = "--tracker none --epochs 2".split()
    first = trainer(*words, "--run-name", "a").run
    before = files_of(first)

    # --resume never begins a run of its own beside it.
    second = trainer(*words, "--run-name", "a", "--resume", "never").run
    assert second.name == "a-2"
    assert sha256(second) == sha256(first)
    assert files_of(first) == before

    # --resume PATH begins a run where another stood.
    at = first / "checkpoints" / "step-00000008"
    done = trainer(*words, "--run-name", "c", "--resume", str(at))
    assert "after step 8" in done.stdout
    assert sha256(done.run) == sha256(first)
    assert without_clock(rows(done.run)) == without_clock(rows(first))


def test_a_run_begun_at_anothers_checkpoint_goes_on_by_the_same_command(trainer):
    words = "--tracker none --epochs 3".split()
    first = trainer(*words, "--run-name", "a").run
    at = first / "checkpoints" / "step-00000016"
    again = [*words, "--run-name", "b", "--resume", str(at)]
    trainer(*again, "--max-steps", "20")
    done = trainer(*again)
    assert "after step 20" in done.stdout
    assert without_clock(rows(done.run))[-1] == without_clock(rows(first))[-1]
    assert "is finished" in trainer(*again).stdout

    # As a kill in the first save leaves it: it begins at PATH once more.
    *older, newest = sorted((done.run / "checkpoints").iterdir())
    for path in older:
        shutil.rmtree(path)
    newest.rename(newest.with_name("step-00000018.tmp"))
    (done.run / "summary.json").unlink()
    done = trainer(*again)
    assert "after step 16" in done.stdout
    assert sha256(done.run) == sha256(first)

    other = [*words, "--run-name", "b", "--resume", str(first)]
    assert "holds another run already" in trainer(*other, check=2).stderr


def test_a_run_that_goes_back_keeps_its_later_checkpoints_aside(trainer):
    """Killed before it has saved again, it goes on from there, and no line is missing or twice."""
    run = trainer(*RUN_A).run
    whole = without_clock(rows(run))
    back_to = run / "checkpoints" / "step-00000024"
    later = run / "checkpoints" / "step-00000032"
    back = [*RUN_A, "--resume", str(back_to)]
    trainer(*back, *"--max-steps 25 --save-every none".split())
    assert not later.exists()
    assert later.with_name("step-00000032.aside-1").is_dir()

    done = trainer(*RUN_A)
    assert "after step 24" in done.stdout
    assert without_clock(rows(run)) == whole


def test_a_run_whose_checkpoints_are_all_damaged(in_process, tmp_path, cache):
    """--resume PATH is refused, and nothing is written; the run's own command says what it does."""
    run = tmp_path / "ck" / "old"
    shutil.copytree(STORED / "format-3", run)
    (run / "checkpoints" / "step-00000008" / "state.json").write_text("{}")
    words = [*TINY_VIT, "--data-dir", cache, "--save-dir", tmp_path / "ck"]
    words += "--dataset digits --limit-train 256".split()

    code, out, err = in_process(train_command, *words, "--run-name", "new", "--resume", run)
    assert code == 2
    assert "step-00000008 is passed over: state.json has the wrong size" in out
    assert err == (
        f"cifar_accel: --resume {run}: holds no whole checkpoint; give another, or leave it out\n"
    )
    assert not (tmp_path / "ck" / "new").exists()

    code, out, err = in_process(train_command, *words, "--run-name", "old", "--max-steps", "1")
    assert code == 0, err
    assert f"resume: {run} holds no whole checkpoint: the run begins anew" in out
    assert f"is kept as {run}/checkpoints/step-00000008.aside-1" in out


def test_figures_of_earlier_versions_that_are_not_finite(in_process, tmp_path, cache):
    """A checkpoint may hold them; this version evaluates again, and its JSON has no such number."""
    run = tmp_path / "ck" / "old"
    shutil.copytree(STORED / "format-3", run)
    folder = run / "checkpoints" / "step-00000008"
    evaluation = {"loss": math.nan, "accuracy": 0.1, "top5_accuracy": 0.5, "evaluated_images": 100}
    state = read_json(folder / "state.json") | {
        "window": {},
        "gradient_norm": math.inf,
        "evaluation": evaluation,
        "evaluated_step": 8,
    }
    (folder / "state.json").write_text(json.dumps(state))
    manifest = read_json(folder / "manifest.json")
    manifest["files"]["state.json"] = {
        "bytes": (folder / "state.json").stat().st_size,
        "sha256": sha256_of(folder / "state.json"),
    }
    write_json(folder / "manifest.json", manifest)

    words = [*TINY_VIT, "--data-dir", cache, "--save-dir", tmp_path / "ck", "--run-name", "old"]
    words += "--dataset digits --limit-train 256 --max-steps 8".split()
    code, out, err = in_process(train_command, *words)
    assert code == 0, err
    assert "after step 8" in out
    assert math.isfinite(summary(run)["test_loss"])
    assert summary(run)["accuracy"] == read_predictions(run)["test"].correct.mean()


# ---- what lies elsewhere now


def test_data_and_weights_that_moved(trainer, tmp_path):
    """They are what they hold, wherever that lies; config.json keeps what the first start said."""
    data = image_folder(tmp_path / "data")
    start = tmp_path / "start.safetensors"
    save_file(timm.create_model("test_vit", num_classes=2, img_size=32).state_dict(), start)
    words = "--model test_vit --recipe plain --batch-size 2 --epochs 2".split()

    def train(*more, check=0):
        return trainer(*RUN_A, *more, base=words, check=check)

    run = train("--dataset", data, "--checkpoint", start, "--max-steps", "1").run
    options = read_json(run / "config.json")["options"]
    weights = run / "model" / "model.safetensors"
    assert weights.stat().st_mode == (run / "model" / "config.json").stat().st_mode

    data = data.rename(tmp_path / "moved")
    start = start.rename(tmp_path / "moved.safetensors")
    moved = ("--dataset", data, "--checkpoint", start)
    assert "after step 1" in train(*moved, "--max-steps", "2").stdout
    assert read_json(run / "config.json")["options"] == options

    # Other images in the same place; without a checkpoint, whose fingerprint would be compared too.
    shutil.copy(data / "train" / "cat" / "0.png", data / "train" / "cat" / "1.png")
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    refused = train(*moved, check=2).stderr
    assert f"--dataset {data}: holds other images than {tmp_path / 'data'} did" in refused
    assert contents(run) == before


def test_a_run_of_the_first_release_goes_on_with_moved_cifar100(tmp_path, cache, cifar):
    """Its checkpoint has format 2, and the fingerprint that its version gave these images."""
    run = tmp_path / "ck" / "old"
    shutil.copytree(STORED / "cifar100-format-2", run)
    before = rows(run)
    words = [*TINY_VIT, "--data-dir", cache, "--save-dir", str(tmp_path / "ck")]
    words += ["--run-name", "old", "--dataset", cifar, "--limit-train", "128"]
    forked_runs.finish(words, tmp_path / "log")
    assert "after step 4" in (tmp_path / "log").read_text()
    assert rows(run)[: len(before)] == before
    assert steps(run) == [2, 4, 6, 8]


# ---- what is in the folder


def test_what_is_not_the_trainers_stays(trainer):
    """Folders of somebody else's in the run folder, whatever their names."""
    run = trainer(*RUN_A, "--max-steps", "8").run
    checkpoints = run / "checkpoints"
    foreign = [
        checkpoints / "step-my-notes.tmp",
        checkpoints / "step-00000001",
        checkpoints / "notes",
        run / "model" / "mine",
        run / "mine",
    ]
    for folder in foreign:
        folder.mkdir()
        (folder / "text").write_text("mine")
    trainer(*RUN_A)
    for folder in foreign:
        assert (folder / "text").read_text() == "mine"

    names = sorted(path.name for path in checkpoints.glob("step-*[0-9]"))
    assert names == ["step-00000001", "step-00000024", "step-00000032"]


def test_two_runs_cannot_write_one_folder(trainer, tmp_path):
    words = "--epochs 400 --run-name a".split()
    run = tmp_path / "ck" / "a"
    process = subprocess.Popen(trainer.command(*words), stdout=subprocess.DEVNULL)
    try:
        wait_for((run / "metrics.jsonl").exists)
        refused = trainer(*words, check=2)
        assert f"in use by process {process.pid}" in refused.stderr
        looked = trainer(*words, "--dry-run", check=2)
        assert "is in use by another process" in looked.stdout
    finally:
        process.kill()
        process.wait()
    done = trainer(*words, "--max-steps", "1")
    assert done.run == run, "nobody holds it now"
