"""Requests to stop: signals, the launcher's end, and --max-time."""

import contextlib
import os
import signal
import time
from typing import Any

import psutil

from cifar_accel.options.values import parse_duration

# One of these is set in a process that torchrun, `accelerate launch` or our own launcher started.
# Only there does the parent's end leave an orphan; elsewhere a parent may go, as under nohup.
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND", "CIFAR_ACCEL_LAUNCHED")


class StopRequest:
    """Collects what asks this process for a checkpoint and an orderly end; `asked` tells.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask, and a SIGINT after any of them ends at once. The end of
    the launcher that started this process asks too, and `max_time` (`2h` from its start).

    Until `training` is set there is nothing to save: the first signal raises KeyboardInterrupt.
    """

    def __init__(self, max_time: str | None = None):
        self.reason: str | None = None
        self.training = False
        # Ignore --max-time until a step is done: else a slow start would never get anywhere.
        self.has_progressed = False
        self.max_time = max_time
        self.deadline: float | None = None
        if max_time:
            self.deadline = psutil.Process().create_time() + parse_duration(max_time)
        self.launched = any(name in os.environ for name in LAUNCHED)
        self.parent = os.getppid()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        # A SIGHUP that is ignored already is nohup's, which asked to outlive the terminal.
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self._on_signal)

    def asked(self) -> bool:
        """Whether this process has been asked to stop; `reason` then says by what."""
        if self.reason is None and self.launched and os.getppid() != self.parent:
            self.reason = "the end of its launcher"
        if self.reason is None and self.has_progressed and self._time_is_up():
            self.reason = f"--max-time {self.max_time}"
        return self.reason is not None

    def _time_is_up(self) -> bool:
        return self.deadline is not None and time.time() >= self.deadline

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
        if not self.training:
            raise KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGINT:
            # Not by print, which might be in the middle of a line and is not reentrant. The same
            # Ctrl-C may have ended who reads it.
            with contextlib.suppress(OSError):
                os.write(
                    2, b"\nstopping after this step with a checkpoint; Ctrl-C again stops at once\n"
                )
