"""Requests to stop: signals, the launcher's end, and --max-time."""

import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from cifar_accel.console import STOPPED
from cifar_accel.errors import Stopped
from cifar_accel.options.values import parse_duration

# One of these is set in a process that torchrun, `accelerate launch` or our own launcher started.
# Only there does the parent's end leave an orphan; elsewhere a parent may go, as under nohup.
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND", "CIFAR_ACCEL_LAUNCHED")
# What asks for an end, beside SIGHUP where it is not ignored.
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A process that is stuck is ended so many seconds after the signal, and two of its longest turns.
PATIENCE = 4.0


class StoppedAtOnce(KeyboardInterrupt):
    """A signal where there is nothing to save.

    A class of its own: once a KeyboardInterrupt itself has come through code that a C library runs,
    Python ends the process as by SIGINT, whatever its exit code was to be.
    """


class StopRequest:
    """Collects what asks this process for a checkpoint and an orderly end; `asked` tells.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask, and a SIGINT after any of them ends at once. The end of
    the launcher that started this process asks too, and `max_time` (`2h` from its start).

    Until `training` is set there is nothing to save: the first signal raises KeyboardInterrupt.

    All this is Python, which does not run while the process waits inside a library: for other
    processes mostly. A thread watches the start and what is `watched`, and ends the process.
    """

    def __init__(self, max_time: str | None = None):
        self.reason: str | None = None
        # Set while libraries are imported; and from when on the run trains.
        self.loading = False
        self.training = False
        # Ignore --max-time until a step is done: else a slow start would never get anywhere.
        self.has_progressed = False
        self.max_time = max_time
        self.deadline: float | None = None
        if max_time:
            # By a clock that nobody sets; the system's tells once how old this process is.
            age = time.time() - psutil.Process().create_time()
            self.deadline = time.monotonic() - age + parse_duration(max_time)
        self.launched = any(name in os.environ for name in LAUNCHED)
        self.parent = os.getppid()

        # Whether a signal raises Stopped at once; see `interruptible`.
        self.interrupts = False
        # Since when the process is watched; the start is the first turn.
        self.turn_began: float | None = time.monotonic()
        self.longest_turn = 0.0
        # What the watching thread has to do before it ends the process.
        self.last_act: Callable[[], None] = lambda: None

        for number in ASKING:
            signal.signal(number, self._on_signal)
        # A SIGHUP that is ignored already is nohup's, which asked to outlive the terminal.
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self._on_signal)
        # The system's own handler writes each signal's number here, whatever Python is at.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def asked(self) -> bool:
        """Whether this process has been asked to stop; `reason` then says by what."""
        if self.reason is None and self.launched and os.getppid() != self.parent:
            self.reason = "the end of its launcher"
        if self.reason is None and self.has_progressed and self._time_is_up():
            self.reason = f"--max-time {self.max_time}"
        return self.reason is not None

    def _time_is_up(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Around a step or a vote: after a signal it may take no longer than its like did before.

        Not around a save, which is never cut short.
        """
        self.turn_began = began = time.monotonic()
        try:
            yield
        finally:
            self.turn_began = None
            # Of the first step most is its preparation.
            if self.has_progressed:
                self.longest_turn = max(self.longest_turn, time.monotonic() - began)

    @contextlib.contextmanager
    def interruptible(self, allowed: bool) -> Iterator[None]:
        """Around what a signal may break off, where that is `allowed`. Raises Stopped."""
        self.interrupts = allowed
        try:
            if allowed and self.reason is not None:
                raise Stopped
            yield
        finally:
            self.interrupts = False

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
        if self.loading:
            # An exception would be raised in an import, where libraries may swallow it.
            self._end("at once")
        if not self.training:
            # It is heard and needs no watching.
            self.turn_began = None
            raise StoppedAtOnce
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGINT:
            # Not by print, which might be in the middle of a line and is not reentrant. The same
            # Ctrl-C may have ended who reads it.
            with contextlib.suppress(OSError):
                os.write(
                    2, b"\nstopping after this step with a checkpoint; Ctrl-C again stops at once\n"
                )
        if self.interrupts:
            self.interrupts = False
            raise Stopped

    def _watch(self, reader: int) -> None:
        """End the process when it was asked to stop and does not come to it; in a thread."""
        # Numbers of other signals come along.
        number = 0
        while number not in (*ASKING, signal.SIGHUP):
            number = os.read(reader, 1)[0]
        self._wait_until_stuck(asked=time.monotonic())
        # Otherwise the command is over, and the process somebody else's.
        if signal.getsignal(signal.SIGTERM) != self._on_signal:
            return

        self.reason = self.reason or signal.Signals(number).name
        self._end(f"by {self.reason} while it waited for something, without a checkpoint")

    def _end(self, how: str) -> None:
        """End the process here and now."""
        text = f"\ncifar_accel: stopped {how}; checkpoints already written are kept\n"
        try:
            # Loader workers, were they suspended.
            for child in multiprocessing.active_children():
                child.kill()
            # Not where nobody reads.
            if select.select([], [2], [], 0)[1]:
                os.write(2, text.encode())
            self.last_act()
        finally:
            os._exit(STOPPED)

    def _wait_until_stuck(self, asked: float) -> None:
        while True:
            began = self.turn_began
            patience = PATIENCE + 2 * self.longest_turn
            if began is not None and time.monotonic() > max(asked, began) + patience:
                return
            time.sleep(0.1)
