"""Trainings as child processes: signals reach them, and their exit codes come back."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cifar_accel.console import STOPPED
from cifar_accel.records.summary import read_summary

# The option of Linux's prctl(2) that has a process signalled when its parent ends.
PR_SET_PDEATHSIG = 1


class Child:
    """A training in a process of its own, which starts at once.

    Args:
        command: it trains, itself or through a launcher.
        environment: variables that are added to this process's own.
        run_folder: the folder that it writes.
        stdout: where its standard output goes, as in `subprocess`; unset: where ours goes.
        stderr: likewise.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        run_folder: Path,
        stdout: int | None = None,
        stderr: IO[str] | None = None,
    ):
        # A launcher between us and the training turns every exit code into 1. How the training
        # ended is told by two files of its run folder, but only if it wrote them during this start:
        # they may also be left from an earlier one. So remember when they were written.
        self.run_folder = run_folder
        self.marker = run_folder / "PREEMPTED"
        self.summary_file = run_folder / "summary.json"
        self.marker_before = _written_at(self.marker)
        self.summary_before = _written_at(self.summary_file)

        self.environment = environment
        self.stderr = stderr
        self.is_training = command[1:3] == ["-m", "cifar_accel"]
        self.process = subprocess.Popen(
            command,
            # By this variable the training knows that its parent's end is its launcher's.
            env={**os.environ, **environment, "CIFAR_ACCEL_LAUNCHED": "1"},
            stdout=stdout,
            stderr=stderr,
            # In a session of its own a Ctrl-C of the terminal reaches it once, through us.
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )

    def signal(self, number: int) -> None:
        """Pass a signal on that asks for an orderly end."""
        # A launcher takes SIGTERM only: SIGUSR1 would kill it and leave its workers. A SIGHUP (the
        # terminal went away) becomes one too, which stops a training in order just as well.
        if not self.is_training or number == signal.SIGHUP:
            number = signal.SIGTERM
        self.process.send_signal(number)

    def exit_code(self, was_asked: bool) -> int:
        """The exit code of the training, once the process has ended.

        `was_asked` says whether a signal was passed on to it.
        """
        code = self.process.wait()
        # A training that failed after it was asked to stop has failed.
        summary_is_new = _written_at(self.summary_file) != self.summary_before
        failed = summary_is_new and read_summary(self.run_folder).get("status") == "failed"
        stopped = was_asked or _written_at(self.marker) not in (self.marker_before, None)
        if code != 0 and stopped and not failed:
            return STOPPED
        # As a shell gives it: 128 + N for a process that signal N ended.
        return code if code >= 0 else 128 - code


def run_child(command: list[str], environment: dict[str, str], run_folder: Path) -> int:
    """Run a training as a `Child`, pass signals on to it, and return its exit code."""
    child = Child(command, environment, run_folder)
    with signals_passed_on([child]) as passed_on:
        child.process.wait()
    return child.exit_code(bool(passed_on))


@contextmanager
def signals_passed_on(children: Collection[Child]) -> Iterator[list[int]]:
    """While this is open, signals to us go to all that is in `children` at that moment.

    Yields the growing list of their numbers.
    """
    passed_on: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        passed_on.append(number)
        for child in children:
            child.signal(number)

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


def _end_with_parent() -> None:
    """In the child, before its command: ask for SIGTERM when the parent ends, were it by SIGKILL.

    A training watches its own parent. Below a launcher that is the launcher, which would not notice
    our end. Only Linux has this.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _written_at(file: Path) -> int | None:
    """When `file` was written last, in nanoseconds, or None where it is not there."""
    return file.stat().st_mtime_ns if os.path.exists(file) else None
