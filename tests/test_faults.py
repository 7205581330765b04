"""Killed at random moments, stopped in every way, on any number of processes: the same run.

Each promise has a short form that runs always and a long form: `./launch.sh test -m faults`.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import forked_runs
import psutil
import pytest
import torch
from conftest import (
    BIN,
    TWO,
    heed_signals,
    rows,
    sha256,
    summary,
    wait_for,
    wandb_runs,
    without_clock,
)

from cifar_accel.data.order import Order
from cifar_accel.files import read_json
from cifar_accel.records import checkpoint

LONG = pytest.mark.faults
EVERYTHING = "--mixup 0.5 --model-ema --model-ema-decay 0.9 --save-every 2steps --epochs 6 --tracker none".split()


def same_run(run: Path, whole: Path) -> None:
    """Weights by their bytes, and every logged figure but the clock's, which only ever goes on."""
    assert sha256(run) == sha256(whole)
    clock = [row["time_s"] for row in rows(run)]
    assert clock == sorted(clock)
    assert without_clock(rows(run)) == without_clock(rows(whole))
    for key in ("accuracy", "best_accuracy", "train_loss", "steps", "status"):
        assert summary(run)[key] == summary(whole)[key]


# ---- killed


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
    own, done, resumed, whole = ("--micro-batch-size", "8"), 0, 0, tmp_path / "ck" / "whole"
    forked_runs.finish(
        words(*EVERYTHING, *own, "--run-name", "whole"),
        tmp_path / "a",
        worlds[0],
        environment=environment,
    )
    while done < kills:  # a run may be over before it was killed so often: then another one
        run = tmp_path / "ck" / f"after-{done}"
        log, options = tmp_path / run.name, words(*EVERYTHING, *own, "--run-name", run.name)
        done += forked_runs.finish_with_kills(
            options, log, run, kills - done, done, worlds, environment=environment
        )
        resumed += forked_runs.resumes(log)
        same_run(run, whole)
    assert resumed >= kills / 2, "the kills left nothing to go on from"


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=LONG)])
def test_killed_and_continued_on_other_numbers_of_processes(words, tmp_path, kills):
    more = (*EVERYTHING, "--epochs", str(6 + 2 * kills))
    forked_runs.finish(words(*more, "--run-name", "whole"), tmp_path / "a")
    options, log = words(*more, "--run-name", "b"), tmp_path / "b"
    done = forked_runs.finish_with_kills(options, log, tmp_path / "ck" / "b", kills, 5, (1, 2, 4))
    assert done == kills, "the run was over before it could be killed"
    assert forked_runs.resumes(log) >= kills / 2, "the kills left nothing to go on from"
    killed, whole = (rows(tmp_path / "ck" / name) for name in ("b", "whole"))
    assert [r["step"] for r in killed] == [r["step"] for r in whole]
    for a, b in zip(killed, whole, strict=True):
        assert a["train/lr"] == b["train/lr"] and a["train/loss"] == pytest.approx(
            b["train/loss"], rel=1e-5
        )


def _praise_the_evaluation() -> None:
    """Make whatever this start evaluates better than what later ones can reach."""
    from cifar_accel import train

    real = train.evaluate_split
    train.evaluate_split = lambda *about: real(*about) | {"accuracy": 2.0}


def test_the_best_accuracy_and_the_clocks_go_on(words, tmp_path):
    options, log, run = (
        ("--tracker", "none", "--run-name", "a"),
        tmp_path / "log",
        tmp_path / "ck" / "a",
    )
    forked_runs.finish(words(*options, "--max-steps", "24"), log, hook=_praise_the_evaluation)
    first = summary(run)
    forked_runs.finish(words(*options), log)
    last = summary(run)
    assert last["accuracy"] <= 1 and first["best_accuracy"] == last["best_accuracy"] == 2
    assert last["time_s"] > first["time_s"] and last["wall_s"] > first["wall_s"]


def _die_after_row(step: int) -> None:
    """End this process once the row of `step` is written."""
    from cifar_accel.records.metrics import Metrics

    real = Metrics.write

    def write(self, row):
        real(self, row)
        if self.enabled and row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Metrics.write = write


def test_killed_before_its_first_checkpoint_it_is_still_one_wandb_run(words, tmp_path):
    options, about = words("--run-name", "a"), {"WANDB_MODE": "offline"}
    killed = forked_runs.finish(
        options, tmp_path / "log", environment=about, hook=partial(_die_after_row, 3)
    )
    run = tmp_path / "ck" / "a"
    assert killed.codes == [-signal.SIGKILL] and not checkpoint.list_checkpoints(run)
    forked_runs.finish(options, tmp_path / "log", environment=about)
    first, second = wandb_runs(run)
    assert first.name == second.name == f"run-{read_json(run / 'config.json')['tracker_id']}.wandb"


def _save_for_ever(run: str, log: str) -> None:
    """Save checkpoints tagged by their step, and note each step that is safe."""
    parameter = torch.nn.Parameter(torch.zeros(200, 200))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    step = max(
        [checkpoint.read_state(p)["step"] for p in checkpoint.list_checkpoints(Path(run))],
        default=0,
    )
    with open(log, "a") as f:
        while True:
            step += 1
            parameter.data.fill_(step)
            optimizer.state[parameter]["momentum_buffer"] = torch.full((200, 200), float(step))
            model, ema = {"w": parameter.data}, {"w": parameter.data * 2}
            checkpoint.save_checkpoint(
                Path(run), model, optimizer.state_dict(), ema, {"step": step}, 2
            )
            f.write(f"{step}\n")
            f.flush()


@pytest.mark.parametrize("kills", [10, pytest.param(60, marks=LONG)])
def test_a_kill_in_a_save_never_mixes_steps_and_never_loses_one(tmp_path, kills):
    rng, log, in_a_save = random.Random(1), tmp_path / "safe", 0
    for _ in range(kills):
        before = log.read_text() if log.exists() else ""
        process = forked_runs.SERVER.Process(target=_save_for_ever, args=(str(tmp_path), str(log)))
        process.start()
        wait_for(lambda before=before: log.exists() and log.read_text() != before)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        in_a_save += bool(list((tmp_path / "checkpoints").glob("*.tmp")))
        best = checkpoint.newest_valid(tmp_path, lambda line: None)
        assert best is not None and checkpoint.list_checkpoints(tmp_path)[0] == best, (
            "what has its name is whole"
        )
        step = checkpoint.read_state(best)["step"]
        assert step >= int(log.read_text().splitlines()[-1]), "what was safe is still there"
        model, ema = torch.nn.Module(), torch.nn.Module()
        model.w, ema.w = (torch.nn.Parameter(torch.zeros(200, 200)) for _ in range(2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        checkpoint.load_checkpoint(best, model, optimizer, ema)
        moment = optimizer.state[model.w]["momentum_buffer"]
        assert (model.w == step).all() and (ema.w == 2 * step).all() and (moment == step).all()
    assert in_a_save >= kills / 4, "the kills missed the saves"


# ---- any number of processes


@pytest.mark.parametrize("accumulations", [(1, 2), pytest.param((3, 4, 8), marks=LONG)])
def test_each_global_batch_is_cut_once_for_1_to_1024_processes(accumulations):
    for world in range(1, 1025):
        for accumulation in accumulations:
            batch, seen = 2 * world * accumulation, []
            for rank in range(world):
                order = Order(5, 10**6, batch, world, rank, accumulation)
                seen += [int(p) for micro in range(accumulation) for p in order.positions(micro)]
            assert sorted(seen) == list(range(batch))


@LONG
@pytest.mark.parametrize("pipeline", ["device", "timm"])
@pytest.mark.parametrize("model", ["test_nfnet", "test_vit"])
def test_world_size_and_accumulation_change_nothing(words, tmp_path, model, pipeline):
    """Fifty steps and more on 1, 2 and 4 processes with 1, 2 and 4 accumulation steps, losses to 1e-5."""
    more = [
        "--model",
        model,
        "--pipeline",
        pipeline,
        "--mixup",
        "0.5",
        "--cutmix",
        "1",
        "--log-every",
        "1",
    ]
    more += ["--tracker", "none", "--epochs", "7", "--learning-rate", "1e-3", "--hflip", "0.5"]
    more += ["--model-kwargs", "patch_size=8"] if model == "test_vit" else []
    more += ["--workers", "1"] if pipeline == "timm" else []
    expected = None
    for world in (1, 2, 4):
        for accumulation in (1, 2, 4):
            name = f"w{world}a{accumulation}"
            micro = ["--micro-batch-size", str(32 // world // accumulation)]
            forked_runs.finish(words(*more, *micro, "--run-name", name), tmp_path / name, world)
            lines = rows(tmp_path / "ck" / name)
            expected = expected or lines
            assert len(lines) == 56 and [r["train/lr"] for r in lines] == [
                r["train/lr"] for r in expected
            ]
            for a, b in zip(lines, expected, strict=True):
                assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5), (
                    name,
                    a["step"],
                )
            assert summary(tmp_path / "ck" / name)["evaluated_images"] == 100


# ---- stopped


def _signal_in_evaluation(number: int, evaluation: int) -> None:
    """Send this process a signal when its n-th evaluation has begun."""
    from cifar_accel import train

    real, calls = train.evaluate, []

    def evaluate(accelerator, model, batches, *more):
        def watched():
            for i, batch in enumerate(batches):
                if len(calls) == evaluation and i == 1 and os.environ.get("RANK", "1") == "1":
                    os.kill(os.getpid(), number)
                yield batch

        calls.append(1)
        return real(accelerator, model, watched(), *more)

    train.evaluate = evaluate


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("evaluation", [2, 4])
def test_stopped_inside_an_evaluation(words, tmp_path, world, evaluation):
    """The signal reaches one rank between two batches; the checkpoint comes at once, and the resume evaluates anew."""
    options = ("--tracker", "none", "--micro-batch-size", "8", "--log-every", "5", "--model-ema")
    forked_runs.finish(words(*options, "--run-name", "whole"), tmp_path / "a", world)
    hook = partial(_signal_in_evaluation, signal.SIGTERM, evaluation)
    stopped = forked_runs.finish(
        words(*options, "--run-name", "b"), tmp_path / "b", world, hook=hook
    )
    run = tmp_path / "ck" / "b"
    assert (
        set(stopped.codes) == {143}
        and (run / "PREEMPTED").exists()
        and summary(run)["status"] == "preempted"
    )
    assert rows(run)[-1]["step"] < 8 * evaluation, (
        "an evaluation that was not finished is not logged"
    )
    assert checkpoint.newest_valid(run, print).name == f"step-{8 * evaluation:08d}"
    if (
        evaluation == 2
    ):  # killed after the row, before a checkpoint that knows of it: it is not logged twice
        hook = partial(_die_after_row, 16)
        killed = forked_runs.finish(
            words(*options, "--run-name", "b"), tmp_path / "b", world, hook=hook
        )
        assert killed.codes[0] == -signal.SIGKILL and rows(run)[-1]["step"] == 16
    forked_runs.finish(words(*options, "--run-name", "b"), tmp_path / "b", world)
    assert not (run / "PREEMPTED").exists()
    same_run(run, tmp_path / "ck" / "whole")


def test_stopped_inside_the_evaluation_of_a_cut_run_that_is_then_allowed_further(words, tmp_path):
    options = ("--tracker", "none", "--micro-batch-size", "8", "--log-every", "50")
    for name in ("whole", "b"):
        hook = partial(_signal_in_evaluation, signal.SIGTERM, 2) if name == "b" else None
        forked_runs.finish(
            words(*options, "--max-steps", "11", "--run-name", name), tmp_path / "log", hook=hook
        )
        forked_runs.finish(words(*options, "--run-name", name), tmp_path / "log")
    assert [row["step"] for row in rows(tmp_path / "ck" / "b")] == [8, 11, 16, 24, 32]
    same_run(tmp_path / "ck" / "b", tmp_path / "ck" / "whole")


def test_max_time_stops_in_order(words, tmp_path):
    options = words("--epochs", "400", "--max-time", "3s", "--run-name", "a", "--tracker", "none")
    began = time.monotonic()
    stopped = forked_runs.finish(options, tmp_path / "log")
    assert stopped.codes == [143] and time.monotonic() - began < 15
    assert "--max-time 3s after step" in (tmp_path / "ck" / "a" / "PREEMPTED").read_text()
    assert checkpoint.newest_valid(tmp_path / "ck" / "a", print) is not None


def test_a_short_max_time_still_goes_on_from_start_to_start(words, tmp_path):
    """Shorter than a start takes: each start makes a step, and the evaluation that is due, before it stops."""
    options = words(
        "--epochs",
        "1",
        "--limit-train",
        "64",
        "--max-time",
        "1s",
        "--run-name",
        "a",
        "--tracker",
        "none",
    )
    slow = partial(time.sleep, 1.1)  # a fork has nothing to load
    codes = [forked_runs.finish(options, tmp_path / "log", hook=slow).codes[0] for _ in range(2)]
    assert codes == [143, 0] and [row["step"] for row in rows(tmp_path / "ck" / "a")] == [2]


def _signal_in_the_test_set() -> None:
    """Stop while the test set is read, after the last step."""
    _signal_in_evaluation(signal.SIGTERM, 2)


def test_stopped_while_the_test_set_is_read(words, tmp_path):
    options = words(
        "--epochs", "1", "--validation-fraction", "0.25", "--save-every", "none", "--run-name", "a"
    )
    options += ["--tracker", "none", "--micro-batch-size", "8"]
    stopped = forked_runs.finish(options, tmp_path / "log", hook=_signal_in_the_test_set)
    run = tmp_path / "ck" / "a"
    assert stopped.codes == [143] and checkpoint.newest_valid(run, print).name == "step-00000006"
    forked_runs.finish(options, tmp_path / "log")
    assert summary(run)["status"] == "finished" and summary(run)["evaluated_images"] == 100
    assert len(rows(run)) == 2


def test_max_steps_where_a_run_was_stopped(words, tmp_path):
    """Its weights are evaluated, though no evaluation was due at that step."""
    options = ("--tracker", "none", "--save-every", "3steps", "--log-every", "3")
    forked_runs.finish(words(*options, "--run-name", "a"), tmp_path / "log")
    at = tmp_path / "ck" / "a" / "checkpoints" / "step-00000030"
    more = ("--resume", str(at), "--run-name", "b", "--max-steps", "30")
    forked_runs.finish(words(*options, *more), tmp_path / "log")
    forked_runs.finish(words(*options, "--run-name", "c", "--max-steps", "30"), tmp_path / "log")
    for key in ("accuracy", "test_loss", "steps"):
        assert summary(tmp_path / "ck" / "b")[key] == summary(tmp_path / "ck" / "c")[key]


def test_ctrl_c_that_ends_the_reader_of_the_output_too(words, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cifar_accel",
            *words("--epochs", "400", "--run-name", "a", "--tracker", "none"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for((tmp_path / "ck" / "a" / "metrics.jsonl").exists)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 143 and (tmp_path / "ck" / "a" / "PREEMPTED").exists()


def test_a_second_ctrl_c_stops_at_once(words, tmp_path):
    """In the middle of a step of some seconds: the first waits for its end, the second does not."""
    slow = ("--image-size", "192", "--batch-size", "256", "--run-name", "a", "--tracker", "none")
    training, log = forked_runs.Training(words(*slow), tmp_path / "log"), tmp_path / "log"
    wait_for(lambda: "parameters" in (log.read_text() if log.exists() else ""))
    time.sleep(1)
    os.kill(training.ranks[0].pid, signal.SIGINT)
    wait_for(lambda: "Ctrl-C again stops at once" in log.read_text())
    os.kill(training.ranks[0].pid, signal.SIGINT)
    assert training.wait(20) and training.codes == [143]
    assert (
        "stopped at once" in log.read_text()
        and not (tmp_path / "ck" / "a" / "checkpoints").exists()
    )


LAUNCHERS = {
    "python": (sys.executable, "-m", "cifar_accel"),
    "launch.sh": (sys.executable, "-m", "cifar_accel.launch"),
    "launch.sh 2": (sys.executable, "-m", "cifar_accel.launch"),
    "accelerate": (
        str(BIN / "accelerate"),
        "launch",
        "--num_processes",
        "1",
        "--cpu",
        "-m",
        "cifar_accel",
    ),
    "torchrun 1": (
        str(BIN / "torchrun"),
        "--standalone",
        "--nproc_per_node",
        "1",
        "-m",
        "cifar_accel",
    ),
    "torchrun 2": (*TWO, "-m", "cifar_accel"),
}
SHORT = {("accelerate", "launcher", signal.SIGKILL), ("torchrun 2", "group", signal.SIGINT)}
SHORT |= {("torchrun 2", "worker", signal.SIGUSR1)}
WAYS = [
    pytest.param(
        launcher, target, number, marks=() if (launcher, target, number) in SHORT else LONG
    )
    for launcher in LAUNCHERS
    if launcher != "launch.sh 2"
    for target in ("worker", "launcher", "group")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL)
    if number != signal.SIGKILL
    or (target == "launcher" and launcher not in ("python", "launch.sh"))
]
for launcher, target in (
    ("python", "worker"),
    ("accelerate", "launcher"),
    ("torchrun 2", "launcher"),
):
    WAYS.append(pytest.param(launcher, target, signal.SIGHUP, marks=LONG))
WAYS.append(pytest.param("torchrun 2", "group", signal.SIGHUP, marks=LONG))
WAYS.append(pytest.param("launch.sh 2", "launcher", signal.SIGKILL, marks=LONG))


@pytest.mark.parametrize("launcher, target, number", WAYS)
def test_every_launcher_target_and_signal_leaves_a_checkpoint(
    words, tmp_path, launcher, target, number, monkeypatch
):
    """Also when the launcher is killed and leaves its workers behind: they see it and stop in order."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    if launcher == "launch.sh 2":
        (tmp_path / "two.yaml").write_text(
            "{distributed_type: MULTI_CPU, num_processes: 2, mixed_precision: 'no'}"
        )
        monkeypatch.setenv("ACCELERATE_CONFIG_FILE", str(tmp_path / "two.yaml"))
    run = tmp_path / "ck" / "a"
    options = words(
        "--epochs", "400", "--run-name", "a", "--tracker", "none", "--save-every", "none"
    )
    about = dict(start_new_session=True, preexec_fn=heed_signals)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*LAUNCHERS[launcher], *options], stdout=log, stderr=log, **about
        )
        wait_for((run / "metrics.jsonl").exists)
        worker = int((run / ".owner").read_text().split()[1])
        family = [worker, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]
        began = time.monotonic()
        match target:
            case "worker":
                os.kill(worker, number)
            case "launcher":
                os.kill(process.pid, number)
            case "group":
                os.killpg(process.pid, number)
        wait_for(lambda: (run / "PREEMPTED").exists() and (run / "summary.json").exists(), 20)
        seconds = time.monotonic() - began
        code = process.wait(60)
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in family), 30)
    assert summary(run)["status"] == "preempted" and checkpoint.newest_valid(run, print) is not None
    assert launcher not in ("python", "launch.sh") or code == 143
    assert seconds < 5, f"{seconds:.1f} s to the checkpoint"
    print(
        json.dumps(
            {
                "launcher": launcher,
                "target": target,
                "signal": number.name,
                "seconds": round(seconds, 2),
            }
        )
    )


def test_workers_do_not_die_before_the_training_does(words, tmp_path):
    """A signal to the whole group reaches the timm pipeline's workers too."""
    options = words(
        "--epochs",
        "400",
        "--pipeline",
        "timm",
        "--workers",
        "2",
        "--run-name",
        "a",
        "--tracker",
        "none",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar_accel", *options], start_new_session=True
    )
    wait_for((tmp_path / "ck" / "a" / "metrics.jsonl").exists)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143 and (tmp_path / "ck" / "a" / "PREEMPTED").exists()


# ---- checkpoints of earlier versions


@pytest.mark.parametrize(
    "folder", sorted((Path(__file__).parent / "data").glob("format-*")), ids=lambda p: p.name
)
def test_every_released_format_goes_on(tmp_path, cache, folder):
    """A run folder that an earlier version left in mid-run, continued by this one with the same command."""
    run = tmp_path / "ck" / "old"
    shutil.copytree(folder, run)
    assert checkpoint.newest_valid(run, print).name == "step-00000008"
    old = rows(run)
    forked_runs.finish(
        [*FORMAT, "--data-dir", cache, "--save-dir", str(tmp_path / "ck")], tmp_path / "log"
    )
    assert "after step 8" in (tmp_path / "log").read_text()
    assert (
        summary(run)["status"] == "finished"
        and rows(run)[: len(old)] == old
        and rows(run)[-1]["step"] == 16
    )


# How the folders in data/ were made (with --max-steps 8): a ViT of 6 thousand weights.
FORMAT = (
    "--dataset digits --model test_vit --no-pretrained --recipe digits --limit-train 256 --limit-test 100 "
    "--batch-size 32 --epochs 2 --learning-rate 3e-3 --log-every 3 --tracker none --run-name old "
    "--model-kwargs embed_dim=8 depth=1 num_heads=1 patch_size=16"
).split()


def test_every_promise_names_its_test():
    """The README's table, line by line."""
    root = Path(__file__).parent
    section = (
        (root.parent / "README.md")
        .read_text()
        .partition("## What you can rely on")[2]
        .partition("\n## ")[0]
    )
    promised = re.findall(r"`(test_\w+)`", section)
    there = "".join(file.read_text() for file in root.glob("test_*.py"))
    assert len(promised) > 25 and not [name for name in promised if f"def {name}(" not in there]
