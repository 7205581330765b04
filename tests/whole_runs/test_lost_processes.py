"""A process that dies, or no longer answers, ends the others of its run."""

import ctypes
import itertools
import os
import signal
import subprocess
import time
from functools import partial

import forked_runs
import psutil
import pytest
from conftest import TWO, summary, wait_for

LONG_RUN = "--epochs 400 --run-name a --tracker none".split()
GONE = "PeerLost: another process of this run is gone"
# setns(2): enter a network namespace.
CLONE_NEWNET = 0x40000000


def wait_briefly(seconds: float) -> None:
    """Hook: between two steps a process waits so long for the others."""
    from cifar_accel.machine import processes

    processes.SHORT_WAIT = seconds


def stand_still(function: str, briefly: float) -> None:
    """Hook: rank 1 stops where it would call that function of the loop for the step after 4.

    No row is due there, so that the ranks wait briefly.
    """
    from cifar_accel import train

    wait_briefly(briefly)
    called = getattr(train, function)

    def stop_before(run, *arguments):
        if run.ranks.rank == 1 and next(calls) == 4:
            os.kill(os.getpid(), signal.SIGSTOP)
        return called(run, *arguments)

    calls = itertools.count()
    setattr(train, function, stop_before)


def save_slowly(briefly: float, seconds: float) -> None:
    """Hook: the first checkpoint takes the main process longer than a step may take."""
    from cifar_accel.records import checkpoint

    wait_briefly(briefly)
    save = checkpoint.save_checkpoint

    def save_late(*arguments):
        checkpoint.save_checkpoint = save
        time.sleep(seconds)
        save(*arguments)

    checkpoint.save_checkpoint = save_late


@pytest.mark.parametrize("dies", [0, 1])
def test_when_one_rank_dies_the_other_ends(words, tmp_path, dies):
    training = forked_runs.Training(words(*LONG_RUN), tmp_path / "log", 2)
    wait_for((tmp_path / "ck" / "a" / "metrics.jsonl").exists)
    began = time.monotonic()
    training.ranks[dies].kill()
    assert training.wait(60)
    print(f"{time.monotonic() - began:.1f} s")

    other = 1 - dies
    assert training.codes[other] == 1
    said = (tmp_path / "log").read_text()
    assert GONE in said and "Traceback" not in said


@pytest.mark.parametrize("function", ["agree", "take_step"])
def test_when_one_rank_stands_still_the_other_ends(words, tmp_path, function):
    """As with a dead host: its connections stay open, and nothing comes over them.

    The other waits for it with its host, or with its device.
    """
    hook = partial(stand_still, function, 2.0)
    training = forked_runs.Training(words(*LONG_RUN), tmp_path / "log", 2, hook=hook)
    stopped = psutil.Process(training.ranks[1].pid)
    wait_for(lambda: stopped.status() == psutil.STATUS_STOPPED)
    began = time.monotonic()
    training.ranks[0].join(60)
    took = time.monotonic() - began
    training.kill()

    assert training.codes == [1, -signal.SIGKILL]
    assert 1.5 < took < 10
    said = (tmp_path / "log").read_text()
    assert GONE in said and "Timed out" in said and "Traceback" not in said
    assert summary(tmp_path / "ck" / "a")["error"].startswith(GONE)


def test_what_one_rank_does_alone_may_take_longer_than_a_step(words, tmp_path):
    hook = partial(save_slowly, 2.0, 3.5)
    options = "--epochs 1 --run-name a --tracker none --save-every 5steps".split()
    training = forked_runs.finish(words(*options), tmp_path / "log", 2, hook=hook)
    assert training.codes == [0, 0], (tmp_path / "log").read_text()


def test_when_one_rank_dies_under_torchrun(trainer, tmp_path):
    run = tmp_path / "ck" / "a"
    command = trainer.command(*LONG_RUN, launcher=TWO)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((run / "metrics.jsonl").exists)

    # The lock names the main process; kill the other one.
    main = int((run / ".lock").read_text().split()[1])
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    other = next(pid for pid in workers if pid != main)
    os.kill(other, signal.SIGKILL)
    assert process.wait(60) != 0
    assert not any(psutil.pid_exists(pid) for pid in workers)


# ---- two hosts


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them; gives their names."""
    names = [f"ca{os.getpid()}{side}" for side in "ab"]
    first, second = names
    commands = [
        f"netns add {first}",
        f"netns add {second}",
        f"link add {first} type veth peer name {second}",
    ]
    for number, name in enumerate(names, 1):
        commands += [
            f"link set {name} netns {name}",
            f"-n {name} addr add 10.77.0.{number}/24 dev {name}",
            f"-n {name} link set lo up",
            f"-n {name} link set {name} up",
        ]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield names
    except FileNotFoundError:
        pytest.skip("no network namespaces here: there is no ip")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def be_on_a_host(names: list[str]) -> None:
    """Hook: this rank is alone on a host of `two_hosts`."""
    from cifar_accel.machine import processes

    host = names[int(os.environ["RANK"])]
    with open(f"/run/netns/{host}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET) == 0
    os.environ |= {"MASTER_ADDR": "10.77.0.1", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    wait_briefly(3.0)
    # The cable may be pulled while a rank evaluates.
    processes.LONG_WAIT = 20.0


def test_a_pulled_cable_ends_the_run_on_both_hosts(words, tmp_path, two_hosts):
    """They find each other by the cable, whatever address their own names have."""
    hook = partial(be_on_a_host, two_hosts)
    training = forked_runs.Training(words(*LONG_RUN), tmp_path / "log", 2, hook=hook)
    try:
        wait_for((tmp_path / "ck" / "a" / "metrics.jsonl").exists, timeout=40)
        assert training.codes == [None, None]
        first, second = two_hosts
        subprocess.run(["ip", "-n", second, "link", "set", second, "down"], check=True)
        began = time.monotonic()
        assert training.wait(30)
        print(f"{time.monotonic() - began:.1f} s")
    finally:
        training.kill()
    said = (tmp_path / "log").read_text()
    assert training.codes == [1, 1], said
    assert said.count(GONE) == 2 and "Traceback" not in said
