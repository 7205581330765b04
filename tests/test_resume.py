"""How a run is stopped, killed and continued, in real processes."""

import shutil
import signal
import subprocess

import pytest
from conftest import (
    TWO,
    heed_signals,
    rows,
    sha256,
    summary,
    wait_for,
    wandb_runs,
    wandb_summary,
    without_clock,
)


@pytest.mark.parametrize(
    "words",
    [
        (),
        (
            "--mixup",
            "0.5",
            "--cutmix",
            "1",
            "--model-ema",
            "--save-every",
            "5steps",
            "--model-kwargs",
            "drop_rate=0.2",
            "drop_path_rate=0.1",
        ),
    ],
)
def test_killed_and_resumed_is_never_killed(trainer, tmp_path, words):
    words = (*words, "--tracker", "none", "--epochs", "6")
    whole = trainer(*words, "--run-name", "whole").run
    run = tmp_path / "ck" / "killed"
    process = subprocess.Popen(
        trainer.command(*words, "--run-name", "killed"), stdout=subprocess.DEVNULL
    )
    wait_for(
        lambda: (
            (run / "metrics.jsonl").exists() and '"step": 18' in (run / "metrics.jsonl").read_text()
        )
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "summary.json").exists(), "the kill came too late to test anything"
    done = trainer(*words, "--run-name", "killed")
    assert "resume: from" in done.stdout
    assert sha256(run) == sha256(whole)
    assert without_clock(rows(run)) == without_clock(rows(whole))
    for key in ("accuracy", "best_accuracy", "train_loss", "steps"):
        assert summary(run)[key] == summary(whole)[key]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_143(trainer, tmp_path, number):
    words = ("--epochs", "16", "--run-name", "stopped")
    run = tmp_path / "ck" / "stopped"
    process = subprocess.Popen(trainer.command(*words), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "metrics.jsonl").exists())
    process.send_signal(number)
    assert process.wait(30) == 143
    assert signal.Signals(number).name in (run / "PREEMPTED").read_text()
    assert summary(run)["status"] == "preempted"
    stopped_at = summary(run)["steps"]
    assert (run / "checkpoints" / f"step-{stopped_at:08d}").is_dir()
    done = trainer(*words)
    assert f"after step {stopped_at}" in done.stdout
    assert not (run / "PREEMPTED").exists() and summary(run)["status"] == "finished"
    first, second = wandb_runs(run)  # two parts of one wandb run
    assert first.name == second.name
    assert wandb_summary(second)["summary"]["accuracy"] == summary(run)["accuracy"]


def test_two_processes_stop_together_and_resume_as_one(trainer, tmp_path):
    words = ("--epochs", "16", "--tracker", "none", "--run-name", "stopped")
    run = tmp_path / "ck" / "stopped"
    command = [*TWO, *trainer.command(*words)[1:]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "metrics.jsonl").exists())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (run / "PREEMPTED").exists() and summary(run)["status"] == "preempted"
    steps = summary(run)["steps"]
    assert (
        "resume: from"
        in trainer("--epochs", "16", "--tracker", "none", "--run-name", "stopped").stdout
    )
    lines = rows(run)
    assert len({line["step"] for line in lines}) == len(lines) and lines[-1]["step"] == 128 > steps


def test_max_steps_cuts_and_a_larger_one_goes_on(trainer):
    whole = trainer("--run-name", "whole", "--tracker", "none").run
    cut = trainer(
        "--run-name", "cut", "--tracker", "none", "--max-steps", "26"
    ).run  # in the last epoch
    assert summary(cut)["steps"] == 26 and rows(cut)[-1]["step"] == 26
    cut = trainer("--run-name", "cut", "--tracker", "none").run
    assert (
        sha256(cut) == sha256(whole) and summary(cut)["train_loss"] == summary(whole)["train_loss"]
    )
    assert [r["train/lr"] for r in rows(cut) if r["step"] == 27] == [
        r["train/lr"] for r in rows(whole) if r["step"] == 27
    ]


def test_stopped_before_the_first_step(trainer, tmp_path):
    """While data and model are made there is nothing to save: the process ends at once, and leaves nothing."""
    process = subprocess.Popen(
        trainer.command("--run-name", "a"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("model: making"):
        pass
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143 and "Traceback" not in err
    assert not (tmp_path / "ck" / "a" / "model").exists()


def test_a_resume_does_not_need_the_starting_weights_again(trainer, tmp_path):
    source = (
        trainer("--epochs", "1", "--tracker", "none", "--run-name", "source").run
        / "model"
        / "model.safetensors"
    )
    weights = tmp_path / "start.safetensors"
    shutil.copy(source, weights)
    words = ("--checkpoint", str(weights), "--tracker", "none", "--run-name", "b")
    trainer(*words, "--max-steps", "8")
    weights.unlink()
    assert "after step 8" in trainer(*words, "--max-steps", "9").stdout


def test_resume_never_and_resume_path(trainer):
    words = ("--tracker", "none", "--epochs", "2")
    first = trainer(*words, "--run-name", "a").run
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    second = trainer(*words, "--run-name", "a", "--resume", "never").run
    assert second.name == "a-2" and sha256(second) == sha256(first)
    assert {p: p.read_bytes() for p in first.rglob("*") if p.is_file()} == before
    done = trainer(
        *words, "--run-name", "c", "--resume", str(first / "checkpoints" / "step-00000008")
    )
    assert "after step 8" in done.stdout and sha256(done.run) == sha256(first)
    assert without_clock(rows(done.run)) == without_clock(rows(first))


def test_a_run_begun_at_anothers_checkpoint_goes_on_by_the_same_command(trainer):
    words = ("--tracker", "none", "--epochs", "3")
    first = trainer(*words, "--run-name", "a").run
    again = (*words, "--run-name", "b", "--resume", str(first / "checkpoints" / "step-00000016"))
    trainer(*again, "--max-steps", "20")
    done = trainer(*again)
    assert (
        "after step 20" in done.stdout
        and without_clock(rows(done.run))[-1] == without_clock(rows(first))[-1]
    )
    assert "is finished" in trainer(*again).stdout
    kept = sorted((done.run / "checkpoints").iterdir())
    for path in kept[:-1]:
        shutil.rmtree(path)
    kept[-1].rename(
        kept[-1].with_name("step-00000018.tmp")
    )  # as a kill in the first save leaves it
    (done.run / "summary.json").unlink()
    done = trainer(*again)
    assert "after step 16" in done.stdout and sha256(done.run) == sha256(first)
    other = (*words, "--run-name", "b", "--resume", str(first))
    assert "holds another run already" in trainer(*other, check=2).stderr


def test_a_run_that_goes_back_keeps_its_later_checkpoints_aside(trainer):
    """Killed before it has saved again, it goes on from where it went back to, and every step has its line."""
    words = ("--tracker", "none", "--run-name", "a")
    run = trainer(*words).run
    whole, later = without_clock(rows(run)), run / "checkpoints" / "step-00000032"
    trainer(
        *words,
        "--resume",
        str(run / "checkpoints" / "step-00000024"),
        "--max-steps",
        "25",
        "--save-every",
        "none",
    )
    assert not later.exists() and later.with_name(later.name + ".aside-1").is_dir()
    done = trainer(*words)
    assert "after step 24" in done.stdout and without_clock(rows(run)) == [
        r for r in whole if r["step"] != 25
    ]


def test_what_is_not_the_trainers_stays(trainer):
    """Folders of somebody else's in the run folder, whatever their names."""
    words = ("--tracker", "none", "--run-name", "a")
    run = trainer(*words, "--max-steps", "8").run
    own = [run / "checkpoints" / name for name in ("step-my-notes.tmp", "step-00000001", "notes")]
    own += [run / "model" / "mine", run / "mine"]
    for folder in own:
        folder.mkdir()
        (folder / "text").write_text("mine")
    trainer(*words)
    assert all((folder / "text").read_text() == "mine" for folder in own)
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*[0-9]"))][1:] == [
        "step-00000024",
        "step-00000032",
    ]


def test_metrics_with_rubbish_go_on(trainer):
    words = ("--tracker", "none", "--run-name", "a")
    run = trainer(*words, "--max-steps", "8").run
    good = rows(run)
    with open(run / "metrics.jsonl", "ab") as f:
        f.write(
            b'\xff\xfe\n{"step": "5"}\n{"step": null}\n[1]\n{"step": 1, "epoch": "x"}\nnothing\n'
        )
    trainer(*words)
    assert rows(run)[: len(good)] == good and [r["step"] for r in rows(run)][-1] == 32


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_stopped_while_the_libraries_are_loaded(trainer, tmp_path, number):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(trainer.command(), preexec_fn=heed_signals, **pipes)
    assert process.stdout is not None and process.stdout.readline().startswith("loading torch")
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143 and "Traceback" not in err and not (tmp_path / "ck").exists()


def test_a_damaged_newest_checkpoint_is_passed_over(trainer):
    words = ("--tracker", "none", "--epochs", "3", "--run-name", "a")
    whole = trainer(*words).run
    digest = sha256(whole)
    (whole / "summary.json").unlink()
    weights = whole / "checkpoints" / "step-00000024" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    looked = trainer(*words, "--dry-run")
    assert "step-00000016" in looked.stdout and "step-00000024 is passed over" in looked.stdout
    done = trainer(*words)
    assert "step-00000024 is passed over" in done.stdout and "after step 16" in done.stdout
    assert sha256(whole) == digest


def test_two_runs_cannot_write_one_folder(trainer, tmp_path):
    run = tmp_path / "ck" / "a"
    process = subprocess.Popen(
        trainer.command("--epochs", "400", "--run-name", "a"), stdout=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists())
        refused = trainer("--epochs", "400", "--run-name", "a", check=2)
        assert f"in use by process {process.pid}" in refused.stderr
        looked = trainer("--epochs", "400", "--run-name", "a", "--dry-run", check=2)
        assert "is in use by another process" in looked.stdout
    finally:
        process.kill()
        process.wait()
    assert trainer("--epochs", "400", "--run-name", "a", "--max-steps", "1").run == run, (
        "nobody holds it now"
    )
