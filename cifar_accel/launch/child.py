"""A training as a child process: signals reach it, and its exit code comes back."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from cifar_accel.records.summary import read_summary


def run_child(command: list[str], environment: dict[str, str], run_folder: Path) -> int:
    """Run `command` as a child, pass signals on to it, and return the exit code of the training in it.

    A launcher between us and the training turns every code into 1; the run folder says when it was stopped by a signal.
    The child has a session of its own, so that a Ctrl-C of the terminal reaches it once, through us.
    """
    marker, forwarded = run_folder / "PREEMPTED", False
    before, summary_before = _changed_at(marker), _changed_at(run_folder / "summary.json")
    process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
    direct = command[1:3] == ["-m", "cifar_accel"]

    def forward(number: int, frame: Any) -> None:
        nonlocal forwarded
        forwarded = True
        # SIGUSR1 would kill a launcher and leave its workers; SIGHUP (the terminal went away) stops in order too.
        process.send_signal(number if direct and number != signal.SIGHUP else signal.SIGTERM)

    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    if (
        signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    ):  # else nohup asked to outlive the terminal
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, forward) for number in numbers}
    try:
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    failed = read_summary(run_folder).get("status") == "failed"
    failed &= _changed_at(run_folder / "summary.json") != summary_before
    if code and not failed and (forwarded or _changed_at(marker) not in (before, None)):
        return 143
    return code if code >= 0 else 128 - code


def _changed_at(file: Path) -> int | None:
    """When `file` was written, in nanoseconds, or None where it is not there."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None
