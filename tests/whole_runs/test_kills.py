"""Runs that are killed, any number of times, end as if they never were."""

import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import forked_runs
import pytest
import torch
from conftest import LONG, ROOT, assert_same_run, rows, steps, summary, wait_for, wandb_runs

from cifar_accel.files import read_json
from cifar_accel.records import checkpoint

# Everything that has a state to lose.
EVERYTHING = (
    "--mixup 0.5 --model-ema --model-ema-decay 0.9 --save-every 2steps --epochs 6 --tracker none "
    "--image-size 16:0.3,24:0.6,32 --layer-decay 0.8"
).split()


@pytest.mark.parametrize(
    "kills, worlds, bf16",
    [
        (6, (1,), False),
        (3, (2,), False),
        pytest.param(25, (1,), False, marks=LONG),
        pytest.param(25, (1,), True, marks=LONG),
        pytest.param(20, (2,), False, marks=LONG),
    ],
)
def test_killed_at_random_moments_is_never_killed(words, tmp_path, kills, worlds, bf16):
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16" if bf16 else "no"}

    def options(name):
        draws = "--cutmix 1 --model-kwargs drop_rate=0.2 drop_path_rate=0.1".split()
        return words(*EVERYTHING, *draws, "--micro-batch-size", "8", "--run-name", name)

    whole = tmp_path / "ck" / "whole"
    forked_runs.finish(options("whole"), tmp_path / "a", worlds[0], environment=environment)

    # A run may be over before it was killed so often: then another one is begun.
    done = resumed = attempts = 0
    while done < kills:
        attempts += 1
        assert attempts <= 3 * kills, "the runs are over before they can be killed"
        run = tmp_path / "ck" / f"attempt-{attempts}"
        log = tmp_path / run.name
        done += forked_runs.finish_with_kills(
            options(run.name),
            log,
            run,
            kills=kills - done,
            seed=attempts,
            worlds=worlds,
            environment=environment,
        )
        resumed += forked_runs.resumes(log)
        assert_same_run(run, whole)
    assert resumed >= kills / 2, "the kills left nothing to go on from"


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=LONG)])
def test_killed_and_continued_on_other_numbers_of_processes(words, tmp_path, kills):
    more = (*EVERYTHING, "--epochs", str(6 + 2 * kills))
    whole = tmp_path / "ck" / "whole"
    forked_runs.finish(words(*more, "--run-name", "whole"), tmp_path / "a")

    killed = tmp_path / "ck" / "killed"
    log = tmp_path / "b"
    options = words(*more, "--run-name", "killed")
    done = forked_runs.finish_with_kills(options, log, killed, kills, seed=5, worlds=(1, 2, 4))
    assert done == kills, "the run was over before it could be killed"
    assert forked_runs.resumes(log) >= kills / 2, "the kills left nothing to go on from"

    # One run up to the order in which numbers are added.
    assert steps(killed) == steps(whole)
    for row, expected in zip(rows(killed), rows(whole), strict=True):
        assert row["train/lr"] == expected["train/lr"]
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)


def praise_the_evaluation() -> None:
    """Hook: whatever this start evaluates is better than what later ones can reach."""
    from cifar_accel import train

    evaluate_split = train.evaluate_split
    train.evaluate_split = lambda *args: evaluate_split(*args) | {"accuracy": 2.0}


def test_the_best_accuracy_and_the_clocks_go_on(words, tmp_path):
    options = words(*"--tracker none --run-name a".split())
    log = tmp_path / "log"
    run = tmp_path / "ck" / "a"
    forked_runs.finish([*options, "--max-steps", "24"], log, hook=praise_the_evaluation)
    first = summary(run)
    forked_runs.finish(options, log)
    last = summary(run)
    assert last["accuracy"] <= 1
    assert first["best_accuracy"] == 2
    assert last["best_accuracy"] == 2
    assert last["time_s"] > first["time_s"]
    assert last["wall_s"] > first["wall_s"]


def test_killed_before_its_first_checkpoint_it_is_still_one_wandb_run(words, tmp_path):
    options = words("--run-name", "a")
    log = tmp_path / "log"
    run = tmp_path / "ck" / "a"
    offline = {"WANDB_MODE": "offline"}
    die = partial(forked_runs.die_after_row, 3)
    killed = forked_runs.finish(options, log, environment=offline, hook=die)
    assert killed.codes == [-signal.SIGKILL]
    assert not checkpoint.list_checkpoints(run)

    forked_runs.finish(options, log, environment=offline)
    first, second = wandb_runs(run)
    assert first.name == second.name
    assert first.name == f"run-{read_json(run / 'config.json')['tracker_id']}.wandb"


# ---- kills inside a save


def save_for_ever(run: Path, log: Path) -> None:
    """Save one checkpoint after the other, and note each step that is safe.

    Every number in a checkpoint is its step, twice that in the average.
    """
    parameter = torch.nn.Parameter(torch.zeros(200, 200))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    saved = [checkpoint.read_state(path).step for path in checkpoint.list_checkpoints(run)]
    step = max(saved, default=0)
    with open(log, "a") as f:
        while True:
            step += 1
            parameter.data.fill_(step)
            optimizer.state[parameter]["momentum_buffer"] = torch.full((200, 200), float(step))
            model = {"w": parameter.data}
            average = {"w": parameter.data * 2}
            state = {"step": step}
            checkpoint.save_checkpoint(run, model, optimizer.state_dict(), average, state, 1)
            f.write(f"{step}\n")
            f.flush()


def one_weight() -> torch.nn.Module:
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(200, 200))
    return model


@pytest.mark.parametrize("kills", [10, pytest.param(60, marks=LONG)])
def test_a_kill_in_a_save_never_mixes_steps_and_never_loses_one(tmp_path, kills):
    rng = random.Random(1)
    log = tmp_path / "safe"
    log.touch()
    kills_in_a_save = 0
    for _ in range(kills):
        # Kill it at a random moment after it has saved one at least.
        noted_before = log.read_text()
        process = forked_runs.SERVER.Process(target=save_for_ever, args=(tmp_path, log))
        process.start()
        wait_for(lambda before=noted_before: log.read_text() != before)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        if list((tmp_path / "checkpoints").glob("*.tmp")):
            kills_in_a_save += 1

        # Nothing is lost.
        newest = checkpoint.newest_valid(tmp_path, lambda line: None)
        assert newest is not None
        assert newest == checkpoint.list_checkpoints(tmp_path)[0], "what has its name is whole"
        step = checkpoint.read_state(newest).step
        last_noted = int(log.read_text().splitlines()[-1])
        assert step >= last_noted, "what was safe is still there"

        # Nothing is mixed.
        model = one_weight()
        average = one_weight()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        checkpoint.load_checkpoint(newest, model, optimizer, average)
        assert (model.w == step).all()
        assert (average.w == 2 * step).all()
        assert (optimizer.state[model.w]["momentum_buffer"] == step).all()
    assert kills_in_a_save >= kills / 4, "the kills missed the saves"


# ---- what earlier versions left


# The folders tests/records/format-N are runs of this command, with --max-steps 8: a ViT of 6
# thousand weights.
FORMAT = (
    "--dataset digits --model test_vit --no-pretrained --recipe digits "
    "--limit-train 256 --limit-test 100 "
    "--batch-size 32 --epochs 2 --learning-rate 3e-3 --log-every 3 --tracker none --run-name old "
    "--model-kwargs embed_dim=8 depth=1 num_heads=1 patch_size=16"
).split()
FORMAT_FOLDERS = sorted((ROOT / "tests" / "records").glob("format-*"))


@pytest.mark.parametrize("folder", FORMAT_FOLDERS, ids=lambda folder: folder.name)
def test_every_released_format_goes_on(tmp_path, cache, folder):
    """A run folder that an earlier version left in mid-run, continued by the same command."""
    run = tmp_path / "ck" / "old"
    shutil.copytree(folder, run)
    assert checkpoint.newest_valid(run, print).name == "step-00000008"
    rows_before = rows(run)

    options = [*FORMAT, "--data-dir", cache, "--save-dir", str(tmp_path / "ck")]
    forked_runs.finish(options, tmp_path / "log")
    assert "after step 8" in (tmp_path / "log").read_text()
    assert summary(run)["status"] == "finished"
    assert rows(run)[: len(rows_before)] == rows_before
    assert rows(run)[-1]["step"] == 16
