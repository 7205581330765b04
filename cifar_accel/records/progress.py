"""What a person sees of a running training, on its main process.

On a terminal that is one progress bar, elsewhere one line a logged row.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from cifar_accel.console import say

# A share of the time that is spent waiting for input is shown from here on.
NOTABLE_INPUT_SHARE = 0.05


class Bar(tqdm):  # type: ignore[type-arg]
    """A progress bar that leaves out what its terminal has no room for."""

    # What stands behind the time, the most important first.
    figures: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The fullest line that fits: without the picture first, then without the last figure."""
        facts = dict(self.format_dict)
        columns = facts.pop("ncols") or sys.maxsize
        head = "{desc} {percentage:3.0f}%"
        forms = [head]
        for count in range(len(self.figures) + 1):
            tail = ", ".join((" {elapsed}<{remaining}", *self.figures[:count]))
            forms += [head + tail, head + "|{bar:10}|" + tail]
        lines = [self.format_meter(**facts | {"bar_format": form}) for form in reversed(forms)]
        return next((line for line in lines if len(line) <= columns), "")


class Progress:
    """Progress over optimizer steps, with loss, accuracy, images/s and the time left.

    Args:
        steps_per_epoch: steps of one epoch.
        total_steps: steps of the whole schedule, a multiple of `steps_per_epoch`.
        start: the step from which this process goes on.
        stop: the step after which it ends.
        images: "test" or "held-out", which the accuracy is of.
        work: what so many first steps take, in any unit; they need not be equal.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        total_steps: int,
        start: int,
        stop: int,
        images: str,
        work: Callable[[int], float],
    ):
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.start = start
        self.images = images
        # What is done at the start and at the end.
        self.work = work
        self.begin = work(start)
        self.end = work(stop)
        self.started_at = time.perf_counter()
        # The last evaluation's, shown until the next one.
        self.accuracy: float | None = None
        self.bar: Any = None
        if sys.stderr.isatty():
            self.bar = Bar(total=self.end, initial=self.begin, dynamic_ncols=True, leave=True)
            self.bar.set_description_str(self._epoch_of(start), refresh=False)

    def step(self, step: int) -> None:
        """Count optimizer step `step`, counted from 1."""
        if self.bar is None:
            return
        # The terminal may have gone away.
        with suppress(OSError):
            self.bar.update(self.work(step) - self.bar.n)

    def log(self, row: dict[str, Any]) -> None:
        """Show a logged row."""
        if "eval/accuracy" in row:
            self.accuracy = row["eval/accuracy"]
        # The epoch in which the row's last step was, also where that step ended it.
        epoch = self._epoch_of(row["step"] - 1)
        figures = self._figures(row)
        if self.bar is not None:
            self.bar.set_description_str(epoch, refresh=False)
            self.bar.figures = figures
            self.bar.refresh()
            return
        step = f"step {row['step']:,}/{self.total_steps:,}"
        left = ""
        # After a resume the first row may be of the step that it begins at, which took no time.
        if row["step"] > self.start:
            # At the mean speed of this process so far.
            done = self.work(row["step"])
            each = (time.perf_counter() - self.started_at) / (done - self.begin)
            seconds = each * (self.end - done)
            left = f", {tqdm.format_interval(round(seconds))} left"
        say(f"{epoch}  {step}  {', '.join(figures)}{left}")

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.close()

    def _epoch_of(self, step: int) -> str:
        """`epoch 3/25`: the epoch of optimizer step `step`, counted from 0."""
        epochs = self.total_steps // self.steps_per_epoch
        epoch = min(step // self.steps_per_epoch + 1, epochs)
        return f"epoch {epoch}/{epochs}"

    def _figures(self, row: dict[str, Any]) -> tuple[str, ...]:
        """`loss 1.234`, `test acc 56.78%`, `9,999 img/s`, and what else is worth a look."""
        figures = [f"loss {row['train/loss']:.3f}"]
        if self.accuracy is not None:
            figures.append(f"{self.images} acc {self.accuracy:.2%}")
        figures.append(f"{row['train/images_per_s']:,.0f} img/s")
        if row["train/input_share"] >= NOTABLE_INPUT_SHARE:
            figures.append(f"{row['train/input_share']:.0%} input")
        if "train/mfu" in row:
            figures.append(f"MFU {row['train/mfu']:.0%}")
        return tuple(figures)
