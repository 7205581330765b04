"""What is measured while training: sums that stay on the device, and the clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cifar_accel.records.state import State


class Sums:
    """Loss and correct answers, summed on the device so that nobody waits."""

    def __init__(self, device: torch.device, world: int):
        # mps has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.zeros(2, dtype=dtype, device=device)
        # Images of all ranks, which take equal shares.
        self.images = 0
        self.world = world

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count one micro-batch.

        Args:
            loss: mean loss of the micro-batch, a scalar.
            logits: [m, classes]; an answer is correct when its largest logit is at the label.
            labels: int64 [m].
        """
        # The mean becomes a sum, so that micro-batches of any size add up.
        correct = (logits.argmax(1) == labels).sum()
        self.values += torch.stack([loss.detach() * len(labels), correct])
        self.images += len(labels) * self.world

    def move_to(self, state: State, loss: float, correct: float) -> None:
        """Add the sums, by now of all ranks, to the state's window and epoch; start anew."""
        for totals in (state.window, state.epoch):
            totals.loss += loss
            totals.correct += correct
            totals.images += self.images
        self.values.zero_()
        self.images = 0


class Clock:
    """Counts seconds into the state: `time_s` and the window's while training, `wall_s` always.

    A context manager: what follows it is not counted.
    """

    def __init__(self, state: State):
        self.state = state
        self.training = True
        self.counted_until = time.perf_counter()
        self.last_checkpoint = self.counted_until

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, *failure: object) -> None:
        self._count()

    def _count(self) -> None:
        """Count the seconds since the last call."""
        # Every second goes to the wall clock, and to training unless it is paused.
        now = time.perf_counter()
        passed = now - self.counted_until
        self.counted_until = now
        self.state.wall_s += passed
        if self.training:
            self.state.time_s += passed
            self.state.window.seconds += passed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Not training: evaluating, saving, logging. Only the wall clock goes on."""
        self._count()
        self.training = False
        try:
            yield
        finally:
            self._count()
            self.training = True

    @contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """The host waits for input, or makes it."""
        began = time.perf_counter()
        yield
        self.state.window.waiting += time.perf_counter() - began

    def minutes_up(self, minutes: float | None) -> bool:
        """Whether so many minutes have passed since the last checkpoint; None never do."""
        return minutes is not None and time.perf_counter() - self.last_checkpoint > 60 * minutes

    def checkpoint_written(self) -> None:
        """The minutes to the next checkpoint begin anew."""
        self.last_checkpoint = time.perf_counter()
