"""A training as a child process: signals reach it, and its exit code comes back."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cifar_accel.console import STOPPED
from cifar_accel.records.summary import read_summary

# The option of Linux's prctl(2) that has a process signalled when its parent ends.
PR_SET_PDEATHSIG = 1


def run_child(command: list[str], environment: dict[str, str], run_folder: Path) -> int:
    """Run a training as a child, pass signals on to it, and return its exit code.

    `command` trains, itself or through a launcher, with `environment` added to this process's own,
    and writes `run_folder`.
    """
    # A launcher between us and the training turns every exit code into 1. How the training ended is
    # told by two files of its run folder, but only if it wrote them during this start: they may
    # also be left from an earlier one. So remember when they were written.
    marker = run_folder / "PREEMPTED"
    summary_file = run_folder / "summary.json"
    marker_before = _written_at(marker)
    summary_before = _written_at(summary_file)

    # By this variable the training knows that the end of its parent is the end of its launcher.
    child_environment = {**os.environ, **environment, "CIFAR_ACCEL_LAUNCHED": "1"}
    # In a session of its own a Ctrl-C of the terminal reaches the child once, through us.
    process = subprocess.Popen(
        command, env=child_environment, start_new_session=True, preexec_fn=_end_with_parent
    )
    with _signals_passed_on(process, command[1:3] == ["-m", "cifar_accel"]) as passed_on:
        code = process.wait()

    # A training that failed after it was asked to stop has failed.
    summary_is_new = _written_at(summary_file) != summary_before
    failed = summary_is_new and read_summary(run_folder).get("status") == "failed"
    stopped = passed_on or _written_at(marker) not in (marker_before, None)
    if code != 0 and stopped and not failed:
        return STOPPED
    # As a shell gives it: 128 + N for a process that signal N ended.
    return code if code >= 0 else 128 - code


def _end_with_parent() -> None:
    """In the child, before its command: ask for SIGTERM when the parent ends, were it by SIGKILL.

    A training watches its own parent. Below a launcher that is the launcher, which would not notice
    our end. Only Linux has this.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _signals_passed_on(process: subprocess.Popen[bytes], is_training: bool) -> Iterator[list[int]]:
    """While this is open, signals to us go to `process`; yields the growing list of them."""
    passed_on: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        passed_on.append(number)
        # A launcher takes SIGTERM only: SIGUSR1 would kill it and leave its workers. A SIGHUP (the
        # terminal went away) becomes one too, which stops a training in order just as well.
        if not is_training or number == signal.SIGHUP:
            number = signal.SIGTERM
        process.send_signal(number)

    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    # A SIGHUP that is ignored already is nohup's, which asked to outlive the terminal.
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield passed_on
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _written_at(file: Path) -> int | None:
    """When `file` was written last, in nanoseconds, or None where it is not there."""
    return file.stat().st_mtime_ns if os.path.exists(file) else None
