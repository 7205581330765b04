"""Requests to stop, without a training: the clock of --max-time, and a process that is stuck."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import forked_runs
import pytest
from conftest import wait_for

from cifar_accel.errors import Stopped
from cifar_accel.machine import signals
from cifar_accel.machine.signals import StopRequest

# ---- --max-time

# The system's clock is two hours later as soon as there is a file `later`, earlier with `earlier`.
SET_CLOCK = """
int clock_gettime(int clock, struct timespec *time) {
    int (*real)(int, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, time);
    if (clock == 0 && access("later", F_OK) == 0) time->tv_sec += 7200;
    if (clock == 0 && access("earlier", F_OK) == 0) time->tv_sec -= 7200;
    return result;
}
"""
IS_ASKED = """
import pathlib, sys, time
from cifar_accel.machine.signals import StopRequest
limit, set_to = sys.argv[1:]
before = time.time()
stop = StopRequest(limit)
stop.has_progressed = True
pathlib.Path(set_to).touch()
time.sleep(1.2)
assert abs(time.time() - before) > 7000
print(stop.asked())
"""


@pytest.mark.parametrize("limit, set_to, asked", [("1h", "later", False), ("1s", "earlier", True)])
def test_max_time_is_no_matter_of_the_system_s_clock(stub, tmp_path, limit, set_to, asked):
    done = subprocess.run(
        [sys.executable, "-c", IS_ASKED, limit, set_to],
        env=stub(SET_CLOCK),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{asked}\n"


# ---- a process that is stuck


def stuck(folder, training, watched, earlier_turn):
    """A process that waits for 2 s and heeds no signal, though it is given half a second.

    `watched` says whether it is watched meanwhile, and `earlier_turn` how long, in seconds, it took
    for another turn before.
    """
    os.chdir(folder)
    os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT), 2)
    signals.PATIENCE = 0.5
    stop = StopRequest()
    stop.training = training
    stop.has_progressed = training
    stop.last_act = lambda: os.close(os.open("last act", os.O_CREAT))
    if training:
        with stop.watched():
            time.sleep(earlier_turn)
    (folder / "ready").touch()
    with stop.watched() if watched else contextlib.nullcontext():
        end = time.monotonic() + 2
        # In the start a signal raises KeyboardInterrupt, which a library swallows here.
        while time.monotonic() < end:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(end - time.monotonic())
    sys.exit(stop.asked())


@pytest.mark.parametrize(
    "training, watched, earlier_turn, code",
    [
        (True, True, 0.0, 143),
        (True, True, 1.0, 1),
        (True, False, 0.0, 1),
        (False, False, 0.0, 1),
    ],
)
def test_only_what_is_watched_is_ended_and_only_in_time(
    tmp_path, training, watched, earlier_turn, code
):
    arguments = (tmp_path, training, watched, earlier_turn)
    process = forked_runs.SERVER.Process(target=stuck, args=arguments)
    process.start()
    wait_for((tmp_path / "ready").exists)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == code
    said = (tmp_path / "err").read_text()
    assert (tmp_path / "last act").exists() == (code == 143)
    assert said.count("stopped by SIGTERM while it waited") == (code == 143)


def interrupted(folder):
    """A process that counts how often a signal broke off what it did."""
    stop = StopRequest()
    stop.training = True
    (folder / "ready").touch()
    broken_off = 0
    for allowed in (False, True, True):
        try:
            with stop.interruptible(allowed):
                time.sleep(0.5)
        except Stopped:
            broken_off += 1
    sys.exit(broken_off)


def test_a_signal_breaks_off_what_it_may_at_once_or_as_it_begins(tmp_path):
    process = forked_runs.SERVER.Process(target=interrupted, args=(tmp_path,))
    process.start()
    wait_for((tmp_path / "ready").exists)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 2
