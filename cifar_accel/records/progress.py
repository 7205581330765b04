"""What a person sees of a running training: one bar on a terminal, plain lines elsewhere; the main process only."""

import contextlib
import shutil
import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """Progress over optimizer steps with loss, accuracy, images/s and time left."""

    def __init__(
        self, total_steps: int, steps_per_epoch: int, start: int, stop: int, enabled: bool
    ):
        self.total, self.per_epoch, self.start, self.stop = (
            total_steps,
            steps_per_epoch,
            start,
            stop,
        )
        self.enabled, self.began, self.accuracy = enabled, time.perf_counter(), ""
        self.bar: Any = None
        if enabled and sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar:10}| {elapsed}<{remaining}{postfix}"
            self.bar = tqdm(
                total=stop, initial=start, bar_format=layout, dynamic_ncols=True, leave=True
            )
            self.bar.set_description_str(self._epoch(start), refresh=False)

    def _epoch(self, step: int) -> str:
        return f"epoch {min(step // self.per_epoch + 1, -(-self.total // self.per_epoch))}/{self.total // self.per_epoch}"

    def step(self) -> None:
        """One optimizer step is done."""
        if self.bar is not None:
            with contextlib.suppress(OSError):  # the terminal went away
                self.bar.update()

    def log(self, row: dict[str, Any]) -> None:
        """Show a logged row."""
        if not self.enabled:
            return
        if "eval/accuracy" in row:
            self.accuracy = f"{row['eval/accuracy']:.2%}"
        speed = f"{row['train/images_per_s']:,.0f} img/s"
        narrow = self.bar is not None and shutil.get_terminal_size().columns < 100
        if row["train/input_share"] >= 0.05 and not narrow:
            speed += f" ({row['train/input_share']:.0%} input)"
        if "train/mfu" in row:
            speed += f", MFU {row['train/mfu']:.0%}"
        shown = (
            f"loss {row['train/loss']:.3f}"
            + (f", acc {self.accuracy}" if self.accuracy else "")
            + f", {speed}"
        )
        if self.bar is not None:
            self.bar.set_description_str(self._epoch(row["step"] - 1), refresh=False)
            self.bar.set_postfix_str(shown)
        else:
            done = row["step"] - self.start  # 0 when only the evaluation of the last step was to do
            left = duration(
                (time.perf_counter() - self.began) / max(1, done) * (self.stop - row["step"])
            )
            with contextlib.suppress(
                OSError
            ):  # a full disk behind stdout costs the line, not the run
                print(
                    f"{self._epoch(row['step'] - 1)}  step {row['step']:,}/{self.total:,}  {shown}, {left} left",
                    flush=True,
                )

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """`95` -> `1:35`; `4000` -> `1:06:40`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
