"""What is measured while training: sums on the device, and clocks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from cifar_accel.errors import Diverged
from cifar_accel.options.values import parse_interval
from cifar_accel.run import State


class Sums:
    """Loss, correct answers and images since the last look, kept on the device."""

    def __init__(self, accelerator: Accelerator):
        wide = (
            torch.float32 if accelerator.device.type == "mps" else torch.float64
        )  # mps has no float64
        self.accelerator = accelerator
        self.values = torch.zeros(2, dtype=wide, device=accelerator.device)
        self.images = 0  # of all ranks: they take equal shares

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count one micro-batch; correct means that the largest logit is at the label."""
        correct = (logits.argmax(1) == labels).sum()
        self.values += torch.stack([loss.detach() * len(labels), correct])
        self.images += len(labels) * self.accelerator.num_processes

    def move_to(self, state: State) -> None:
        """Add the sums over all ranks to the state's window and epoch, and start anew. All ranks enter; the host waits.

        Raises Diverged on every rank when the loss is not finite.
        """
        loss, correct = self.accelerator.reduce(self.values).tolist()
        if loss != loss or abs(loss) == float("inf"):
            raise Diverged(f"the loss became {loss} by step {state.step:,}")
        for sums in (state.window, state.epoch):
            for i, value in enumerate((loss, correct, self.images)):
                sums[i] += value
        self.values.zero_()
        self.images = 0


class Clock:
    """Keeps state.time_s and the window's seconds (training only, and waiting) and state.wall_s (everything)."""

    def __init__(self, state: State):
        self.state, self.training = state, True
        self.mark = self.saved = time.perf_counter()

    def stop(self) -> None:
        """Training pauses, the device being done."""
        now = time.perf_counter()
        self.state.wall_s += now - self.mark
        if self.training:
            self.state.time_s += now - self.mark
            self.state.window[3] += now - self.mark
        self.mark, self.training = now, False

    def start(self) -> None:
        """Training goes on."""
        self.stop()
        self.training = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The host waits for input, or makes it."""
        began = time.perf_counter()
        yield
        self.state.window[4] += time.perf_counter() - began

    def minutes_up(self, save_every: str) -> bool:
        """Whether a checkpoint by the clock is due."""
        count, unit = parse_interval(save_every)
        return unit == "minute" and time.perf_counter() - self.saved > 60 * count
