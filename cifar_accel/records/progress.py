"""What a person sees of a running training; only the main process shows anything.

On a terminal that is one progress bar, elsewhere one line a logged row.
"""

import shutil
import sys
import time
from contextlib import suppress
from typing import Any

from tqdm import tqdm

# Description, percentage, bar, time passed and left, then loss, accuracy and speed.
BAR_LAYOUT = "{desc} {percentage:3.0f}%|{bar:10}| {elapsed}<{remaining}{postfix}"

# A share of the time that is spent waiting for input is shown from here on.
NOTABLE_INPUT_SHARE = 0.05

# On a terminal of fewer columns, that share is left out.
WIDE_TERMINAL = 100


class Progress:
    """Progress over optimizer steps, with loss, accuracy, images/s and the time left.

    Args:
        total_steps: steps of the whole schedule, a multiple of `steps_per_epoch`.
        steps_per_epoch: steps of one epoch.
        start: the step from which this process goes on.
        stop: the step after which it ends.
        enabled: whether to show anything.
    """

    def __init__(
        self, total_steps: int, steps_per_epoch: int, start: int, stop: int, enabled: bool
    ):
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.start = start
        self.stop = stop
        self.enabled = enabled
        self.started_at = time.perf_counter()
        # The last evaluation's, shown until the next one.
        self.accuracy: float | None = None
        self.bar: Any = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=stop, initial=start, bar_format=BAR_LAYOUT, dynamic_ncols=True, leave=True
            )
            self.bar.set_description_str(self._epoch_of(start), refresh=False)

    def step(self) -> None:
        """Count one optimizer step."""
        if self.bar is None:
            return
        # The terminal may have gone away.
        with suppress(OSError):
            self.bar.update()

    def log(self, row: dict[str, Any]) -> None:
        """Show a logged row."""
        if not self.enabled:
            return
        if "eval/accuracy" in row:
            self.accuracy = row["eval/accuracy"]
        # The epoch in which the row's last step was, also where that step ended it.
        epoch = self._epoch_of(row["step"] - 1)
        figures = self._figures(row)
        if self.bar is not None:
            self.bar.set_description_str(epoch, refresh=False)
            self.bar.set_postfix_str(figures)
            return
        step = f"step {row['step']:,}/{self.total_steps:,}"
        left = ""
        # After a resume the first row may be of the step that it begins at, which took no time.
        if row["step"] > self.start:
            left = f", {format_duration(self._seconds_left(row['step']))} left"
        # A full disk behind stdout costs the line, not the run.
        with suppress(OSError):
            print(f"{epoch}  {step}  {figures}{left}", flush=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.close()

    def _epoch_of(self, step: int) -> str:
        """`epoch 3/25`: the epoch of optimizer step `step`, counted from 0."""
        epochs = self.total_steps // self.steps_per_epoch
        epoch = min(step // self.steps_per_epoch + 1, epochs)
        return f"epoch {epoch}/{epochs}"

    def _figures(self, row: dict[str, Any]) -> str:
        """`loss 1.234, acc 56.78%, 9,999 img/s`, and what else is worth a look."""
        figures = [f"loss {row['train/loss']:.3f}"]
        if self.accuracy is not None:
            figures.append(f"acc {self.accuracy:.2%}")
        speed = f"{row['train/images_per_s']:,.0f} img/s"
        narrow = self.bar is not None and shutil.get_terminal_size().columns < WIDE_TERMINAL
        if row["train/input_share"] >= NOTABLE_INPUT_SHARE and not narrow:
            speed += f" ({row['train/input_share']:.0%} input)"
        figures.append(speed)
        if "train/mfu" in row:
            figures.append(f"MFU {row['train/mfu']:.0%}")
        return ", ".join(figures)

    def _seconds_left(self, step: int) -> float:
        """Seconds to the last step, at the mean speed of this process so far."""
        passed = time.perf_counter() - self.started_at
        return passed / (step - self.start) * (self.stop - step)


def format_duration(seconds: float) -> str:
    """`95` -> `1:35`; `4000` -> `1:06:40`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"
