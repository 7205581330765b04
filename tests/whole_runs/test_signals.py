"""Stops in order: signals, the launcher's end, --max-time, inside evaluations too."""

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import forked_runs
import psutil
import pytest
from conftest import BIN, LONG, TWO, assert_same_run, heed_signals, steps, summary, wait_for

from cifar_accel.records import checkpoint

# Too long to end by itself.
ENDLESS = "--epochs 400 --run-name a --tracker none".split()


def signal_in_evaluation(number: int, evaluation: int) -> None:
    """Hook: signal `number` in the middle of the n-th evaluation, to rank 1 where there is one."""
    from cifar_accel import train

    evaluate = train.evaluate
    calls = 0

    def evaluate_and_signal(accelerator, model, batches, *more):
        nonlocal calls
        calls += 1

        def signalled_batches():
            for i, batch in enumerate(batches):
                if calls == evaluation and i == 1 and os.environ.get("RANK", "1") == "1":
                    os.kill(os.getpid(), number)
                yield batch

        return evaluate(accelerator, model, signalled_batches(), *more)

    train.evaluate = evaluate_and_signal


# ---- inside an evaluation


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("evaluation", [2, 4])
def test_stopped_inside_an_evaluation(words, tmp_path, world, evaluation):
    """The signal reaches one rank between two batches.

    The checkpoint comes at once, and the resume evaluates anew.
    """
    options = "--tracker none --micro-batch-size 8 --log-every 5 --model-ema".split()
    whole = tmp_path / "ck" / "whole"
    forked_runs.finish(words(*options, "--run-name", "whole"), tmp_path / "a", world)

    run = tmp_path / "ck" / "b"
    log = tmp_path / "b"
    options = words(*options, "--run-name", "b")
    stop = partial(signal_in_evaluation, signal.SIGTERM, evaluation)
    stopped = forked_runs.finish(options, log, world, hook=stop)
    assert set(stopped.codes) == {143}
    assert (run / "PREEMPTED").exists()
    assert summary(run)["status"] == "preempted"
    evaluated_step = 8 * evaluation
    assert steps(run)[-1] < evaluated_step, "an evaluation that was not finished is not logged"
    assert checkpoint.newest_valid(run, print).name == f"step-{evaluated_step:08d}"

    # Killed after the row, before a checkpoint that knows of it: it is not logged twice.
    if evaluation == 2:
        die = partial(forked_runs.die_after_row, 16)
        killed = forked_runs.finish(options, log, world, hook=die)
        assert killed.codes[0] == -signal.SIGKILL
        assert steps(run)[-1] == 16

    forked_runs.finish(options, log, world)
    assert not (run / "PREEMPTED").exists()
    assert_same_run(run, whole)


def test_stopped_inside_the_evaluation_of_a_cut_run_that_is_then_allowed_further(words, tmp_path):
    options = "--tracker none --micro-batch-size 8 --log-every 50".split()
    stop = partial(signal_in_evaluation, signal.SIGTERM, 2)
    for name, hook in (("whole", None), ("stopped", stop)):
        own = words(*options, "--run-name", name)
        forked_runs.finish([*own, "--max-steps", "11"], tmp_path / "log", hook=hook)
        forked_runs.finish(own, tmp_path / "log")
    stopped = tmp_path / "ck" / "stopped"
    # The row of the cut is no row of a run that was never cut.
    assert steps(stopped) == [8, 16, 24, 32]
    assert_same_run(stopped, tmp_path / "ck" / "whole")


def test_stopped_while_the_test_set_is_read(words, tmp_path):
    """After the last step, in the second evaluation: the first is of held-out images."""
    options = words(
        *"--epochs 1 --validation-fraction 0.25 --save-every none --run-name a".split(),
        *"--tracker none --micro-batch-size 8".split(),
    )
    run = tmp_path / "ck" / "a"
    stop = partial(signal_in_evaluation, signal.SIGTERM, 2)
    stopped = forked_runs.finish(options, tmp_path / "log", hook=stop)
    assert stopped.codes == [143]
    assert checkpoint.newest_valid(run, print).name == "step-00000006"

    forked_runs.finish(options, tmp_path / "log")
    assert summary(run)["status"] == "finished"
    assert summary(run)["evaluated_images"] == 100
    assert len(steps(run)) == 2


# ---- --max-time and --max-steps


def test_max_time_stops_in_order(words, tmp_path):
    run = tmp_path / "ck" / "a"
    began = time.monotonic()
    stopped = forked_runs.finish(words(*ENDLESS, "--max-time", "3s"), tmp_path / "log")
    assert stopped.codes == [143]
    assert time.monotonic() - began < 15
    assert "--max-time 3s after step" in (run / "PREEMPTED").read_text()
    assert checkpoint.newest_valid(run, print) is not None


def test_a_short_max_time_still_goes_on_from_start_to_start(words, tmp_path):
    """Shorter than a start takes: each makes a step, and the evaluation that is due."""
    options = "--epochs 1 --limit-train 64 --max-time 1s --run-name a --tracker none".split()
    # A fork has nothing to load, so it must be slowed down.
    slow = partial(time.sleep, 1.1)
    codes = []
    for _ in range(2):
        codes += forked_runs.finish(words(*options), tmp_path / "log", hook=slow).codes
    assert codes == [143, 0]
    assert steps(tmp_path / "ck" / "a") == [2]


def test_max_steps_where_a_run_was_stopped(words, tmp_path):
    """Its weights are evaluated, though no evaluation was due at that step."""
    options = "--tracker none --save-every 3steps --log-every 3".split()
    forked_runs.finish(words(*options, "--run-name", "a"), tmp_path / "log")

    # Resumed at step 30, to train no further; and trained to step 30 in one go.
    at = tmp_path / "ck" / "a" / "checkpoints" / "step-00000030"
    cut = words(*options, "--max-steps", "30")
    forked_runs.finish([*cut, "--run-name", "b", "--resume", str(at)], tmp_path / "log")
    forked_runs.finish([*cut, "--run-name", "c"], tmp_path / "log")
    resumed = summary(tmp_path / "ck" / "b")
    straight = summary(tmp_path / "ck" / "c")
    for key in ("accuracy", "test_loss", "steps"):
        assert resumed[key] == straight[key]


# ---- Ctrl-C


def test_ctrl_c_that_ends_the_reader_of_the_output_too(words, tmp_path):
    """As in `python -m cifar_accel | tee log`."""
    run = tmp_path / "ck" / "a"
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar_accel", *words(*ENDLESS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for((run / "metrics.jsonl").exists)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 143
    assert (run / "PREEMPTED").exists()


def sleep_in_a_step() -> None:
    """Hook: the first step takes a minute."""
    from cifar_accel import train

    def slow(*words):
        print("in a step", flush=True)
        time.sleep(60)

    train.take_step = slow


def test_a_second_ctrl_c_stops_at_once(words, tmp_path):
    """In the middle of a step: the first waits for its end, the second does not."""
    options = "--run-name a --tracker none".split()
    log = tmp_path / "log"
    log.touch()
    training = forked_runs.Training(words(*options), log, hook=sleep_in_a_step)
    wait_for(lambda: "in a step" in log.read_text())
    os.kill(training.ranks[0].pid, signal.SIGINT)
    wait_for(lambda: "Ctrl-C again stops at once" in log.read_text())
    os.kill(training.ranks[0].pid, signal.SIGINT)
    assert training.wait(20)
    assert training.codes == [143]
    assert "stopped at once" in log.read_text()
    assert not (tmp_path / "ck" / "a" / "checkpoints").exists()


# ---- a process that is stuck


def fork_workers() -> None:
    """Hook: loader workers are forks, as in a process of its own, and so have what it has."""
    multiprocessing.set_start_method("fork", force=True)


def suspend_worker(run: Path, evaluation: bool) -> None:
    """Hook: a loader worker stops for ever, as on a dead disk.

    It is asked for the images of step 12, or of the evaluation after step 16.
    """
    from cifar_accel.data.timm_loader import TimmImages

    fork_workers()
    make = "_centred" if evaluation else "_augmented"
    make_pixels = getattr(TimmImages, make)

    def make_or_stop(self, request):
        due = steps(run)[-1] == 15 if evaluation else request.step == 12
        if due:
            # What it was asked for before has arrived when the training stands at its step.
            wait_for(lambda: steps(run)[-1] >= 12)
            os.kill(os.getpid(), signal.SIGSTOP)
        return make_pixels(self, request)

    setattr(TimmImages, make, make_or_stop)


def wait_until_stuck(training: forked_runs.Training, run: Path, step: int) -> None:
    """Wait until a loader worker is stopped, and the training has come to the row of `step`."""
    last_rank = psutil.Process(training.ranks[-1].pid)

    def is_stuck() -> bool:
        states = [worker.status() for worker in last_rank.children()]
        return psutil.STATUS_STOPPED in states and steps(run)[-1] == step

    wait_for(is_stuck)


@pytest.mark.parametrize("evaluation", [False, True])
def test_a_stuck_worker_does_not_keep_the_checkpoint(words, tmp_path, evaluation):
    options = words(*"--pipeline timm --workers 2 --save-every none --tracker none".split())
    whole = tmp_path / "ck" / "whole"
    forked_runs.finish([*options, "--run-name", "whole"], tmp_path / "a", hook=fork_workers)

    run = tmp_path / "ck" / "b"
    log = tmp_path / "b"
    options += ["--run-name", "b"]
    hook = partial(suspend_worker, run, evaluation)
    training = forked_runs.Training(options, log, hook=hook)
    wait_until_stuck(training, run, 15 if evaluation else 12)
    began = time.monotonic()
    os.kill(training.ranks[0].pid, signal.SIGTERM)
    assert training.wait(20)
    seconds = time.monotonic() - began
    assert training.codes == [143]
    assert seconds < 5, f"{seconds:.1f} s"
    said = log.read_text()
    assert "Traceback" not in said and "stopped by SIGTERM after step" in said
    step = 16 if evaluation else 12
    assert checkpoint.newest_valid(run, print).name == f"step-{step:08d}"

    forked_runs.finish(options, log, hook=fork_workers)
    assert_same_run(run, whole)


def test_a_stuck_worker_of_several_processes(words, tmp_path):
    """They cannot agree, so they end without a checkpoint: one waits for images, one for it."""
    options = words(*"--pipeline timm --workers 1 --run-name a --tracker none".split())
    run = tmp_path / "ck" / "a"
    log = tmp_path / "log"
    hook = partial(suspend_worker_of_rank_1, run)
    training = forked_runs.Training(options, log, 2, hook=hook)
    wait_until_stuck(training, run, 12)
    family = [child.pid for rank in training.ranks for child in psutil.Process(rank.pid).children()]
    began = time.monotonic()
    for rank in training.ranks:
        os.kill(rank.pid, signal.SIGTERM)
    assert training.wait(20)
    seconds = time.monotonic() - began
    assert training.codes == [143, 143]
    assert seconds < 6, f"{seconds:.1f} s"

    # The same command goes on from the last checkpoint.
    said = log.read_text()
    assert "Traceback" not in said and "stopped by SIGTERM while it waited" in said
    assert "goes on from step 8" in (run / "PREEMPTED").read_text()
    assert summary(run)["status"] == "preempted"
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in family), 10)


def test_a_reader_that_reads_no_more_does_not_keep_it(words, tmp_path):
    """As behind a pager, or a terminal that is held: what it prints finds no room."""
    run = tmp_path / "ck" / "a"
    command = [*PYTHON, *words(*ENDLESS, "--log-every", "1", "--save-every", "8steps")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as training:
        fcntl.fcntl(training.stdout, fcntl.F_SETPIPE_SZ, 4096)
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(steps(run)) > 20, 60)
        # It stands still when a second adds no row.
        known = 0
        while known < len(steps(run)):
            known = len(steps(run))
            time.sleep(1)
        began = time.monotonic()
        training.terminate()
        assert training.wait(20) == 143
        assert time.monotonic() - began < 6
    assert (run / "PREEMPTED").exists()


def suspend_worker_of_rank_1(run: Path) -> None:
    """Hook: as `suspend_worker`, on rank 1 alone."""
    fork_workers()
    if os.environ["RANK"] == "1":
        suspend_worker(run, evaluation=False)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_stopped_while_it_waits_for_the_other_processes(words, tmp_path, rank):
    """The other of the two never comes."""
    log = tmp_path / "log"
    # What torchrun sets.
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(forked_runs._free_port()),
    }
    options = words(*"--run-name a --tracker none".split())
    training = forked_runs.Training(options, log, environment=environment)
    waits = psutil.Process(training.ranks[0].pid)
    # It has come to wait when it listens, or asks again and again.
    time.sleep(2)
    assert waits.is_running()
    began = time.monotonic()
    waits.terminate()
    assert training.wait(20)
    assert training.codes == [143]
    assert time.monotonic() - began < 5
    assert log.read_text().count("stopped by SIGTERM while it waited") == 1
    assert not (tmp_path / "ck").exists()


# ---- every launcher


PYTHON = (sys.executable, "-m", "cifar_accel")
LAUNCH_SH = (sys.executable, "-m", "cifar_accel.launch")
ACCELERATE = (str(BIN / "accelerate"), *"launch --num_processes 1 --cpu -m cifar_accel".split())
TORCHRUN = (str(BIN / "torchrun"), *"--standalone --nproc_per_node 1 -m cifar_accel".split())
LAUNCHERS = {
    "python": PYTHON,
    "launch.sh": LAUNCH_SH,
    "launch.sh 2": LAUNCH_SH,
    "accelerate": ACCELERATE,
    "torchrun 1": TORCHRUN,
    "torchrun 2": (*TWO, "-m", "cifar_accel"),
}
# These are one process, which keeps its exit code.
ONE_PROCESS = ("python", "launch.sh")
# What is tested each time; the others only in the long form.
SHORT = [
    ("accelerate", "launcher", signal.SIGKILL),
    ("launch.sh", "launcher", signal.SIGHUP),
    ("torchrun 2", "worker", signal.SIGUSR1),
]


def ways() -> list:
    """Every launcher, whom of it a signal is sent to, and which signal."""
    found = []
    for launcher in ("python", "launch.sh", "accelerate", "torchrun 1", "torchrun 2"):
        for target in ("worker", "launcher", "group"):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                found.append((launcher, target, number))
        # A killed worker can save nothing, so SIGKILL is for launchers that are not the worker.
        if launcher not in ONE_PROCESS:
            found.append((launcher, "launcher", signal.SIGKILL))
    found += [
        ("launch.sh 2", "launcher", signal.SIGKILL),
        ("python", "worker", signal.SIGHUP),
        ("launch.sh", "launcher", signal.SIGHUP),
        ("accelerate", "launcher", signal.SIGHUP),
        ("torchrun 2", "launcher", signal.SIGHUP),
        ("torchrun 2", "group", signal.SIGHUP),
    ]
    return [pytest.param(*way, marks=() if way in SHORT else LONG) for way in found]


@pytest.mark.parametrize("launcher, target, number", ways())
def test_every_launcher_target_and_signal_leaves_a_checkpoint(
    words, tmp_path, launcher, target, number, monkeypatch
):
    """Also when the launcher is killed and leaves its workers behind: they stop in order."""
    # A folder without an Accelerate config of the user's own.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    if launcher == "launch.sh 2":
        config = tmp_path / "two.yaml"
        config.write_text("{distributed_type: MULTI_CPU, num_processes: 2, mixed_precision: 'no'}")
        monkeypatch.setenv("ACCELERATE_CONFIG_FILE", str(config))

    run = tmp_path / "ck" / "a"
    command = [*LAUNCHERS[launcher], *words(*ENDLESS, "--save-every", "none")]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, preexec_fn=heed_signals
        )
        wait_for((run / "metrics.jsonl").exists)

        # The lock names the main process.
        worker = int((run / ".lock").read_text().split()[1])
        children = psutil.Process(process.pid).children(recursive=True)
        family = [worker, *(child.pid for child in children)]

        began = time.monotonic()
        if target == "worker":
            os.kill(worker, number)
        elif target == "launcher":
            os.kill(process.pid, number)
        else:
            os.killpg(process.pid, number)
        wait_for((run / "PREEMPTED").exists, 20)
        wait_for((run / "summary.json").exists, 20)
        seconds = time.monotonic() - began
        code = process.wait(60)
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in family), 30)

    assert summary(run)["status"] == "preempted"
    assert checkpoint.newest_valid(run, print) is not None
    if launcher in ONE_PROCESS:
        assert code == 143
    assert seconds < 5, f"{seconds:.1f} s to the checkpoint"
    measured = {"launcher": launcher, "target": target, "signal": number.name}
    print(json.dumps(measured | {"seconds": round(seconds, 2)}))


def test_workers_do_not_die_before_the_training_does(words, tmp_path):
    """A signal to the whole group reaches the timm pipeline's workers too."""
    run = tmp_path / "ck" / "a"
    options = words(*ENDLESS, *"--pipeline timm --workers 2".split())
    process = subprocess.Popen([*PYTHON, *options], start_new_session=True)
    wait_for((run / "metrics.jsonl").exists)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143
    assert (run / "PREEMPTED").exists()
