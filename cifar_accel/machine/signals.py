"""Why and when a run ends before its last step: signals, its launcher's end, --max-time, and failures in one line.

Imports nothing heavy.
"""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from cifar_accel.options.values import parse_duration

# How a parent that starts trainings and passes signals on to them is called.
LAUNCHERS = {
    "accelerate",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
}


LAUNCHERS |= {"cifar-accel", "cifar_accel.launch"}


class StopRequest:
    """Collects what asks this process for a checkpoint and an orderly end; `asked` tells.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask, and a second SIGINT ends at once. So do the end of a launcher that started
    this process, which would leave it an orphan, and `max_time` (`2h`; counted from the start of the process). Until
    `training` is set there is nothing to save, and the first signal ends the process by KeyboardInterrupt.
    """

    def __init__(self, max_time: str | None = None):
        self.reason: str | None = None
        self.training = False
        self.max_time = max_time
        self.deadline = (
            psutil.Process().create_time() + parse_duration(max_time) if max_time else None
        )
        self.progressed = (
            False  # the deadline waits for a first step, or a start could end where it began
        )
        self.launchers = _launchers(os.getppid())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        if (
            signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        ):  # else nohup asked to outlive the terminal
            signal.signal(signal.SIGHUP, self._on_signal)

    def asked(self) -> bool:
        """Whether this process has been asked to stop."""
        if self.reason is None and not self._launchers_live():
            self.reason = "the end of its launcher"
        if (
            self.reason is None
            and self.deadline
            and self.progressed
            and time.time() >= self.deadline
        ):
            self.reason = f"--max-time {self.max_time}"
        return self.reason is not None

    def _launchers_live(self) -> bool:
        """Whether each launcher is still the parent of the next: who loses a parent is given another."""
        parents = [process.pid for process in self.launchers]
        try:
            return (
                not parents or [os.getppid(), *(p.ppid() for p in self.launchers[:-1])] == parents
            )
        except psutil.Error:
            return False

    def _on_signal(self, number: int, frame: Any) -> None:
        self.reason = signal.Signals(number).name
        if not self.training:
            raise KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGINT:  # print might be in the middle of a line, and is not reentrant
            with contextlib.suppress(OSError):  # the same Ctrl-C may have ended who reads it
                os.write(
                    2, b"\nstopping after this step with a checkpoint; Ctrl-C again stops at once\n"
                )


def _launchers(pid: int) -> list[psutil.Process]:
    """`pid` and its ancestors as long as each is one of `LAUNCHERS`, by the words of its command."""
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        process: psutil.Process | None = psutil.Process(pid)
        while process and not LAUNCHERS.isdisjoint(
            Path(word).name for word in process.cmdline()[:4]
        ):
            found.append(process)
            process = process.parent()
    return found
