"""What changes in a run besides weights and optimizer: the content of state.json."""

from dataclasses import dataclass, field
from typing import Any

from cifar_accel.options.options import NotNegativeInt


@dataclass
class Totals:
    """Sums over training images, of all ranks together."""

    loss: float = 0.0
    correct: float = 0.0
    images: float = 0.0


@dataclass
class Window(Totals):
    """Sums since the last row, with the seconds that they took."""

    seconds: float = 0.0
    # The part of `seconds` in which the host waited for input, or made it.
    waiting: float = 0.0


@dataclass
class State:
    """Where a run stands. Every value is JSON, so that asdict() of it is what state.json holds."""

    # Optimizer steps taken.
    step: NotNegativeInt = 0
    # Seconds of training alone, and of everything since the first step; over all starts.
    time_s: float = 0.0
    wall_s: float = 0.0
    # Sums since the last row, and since the current epoch began.
    window: Window = field(default_factory=Window)
    epoch: Totals = field(default_factory=Totals)
    # Of the last step, before clipping.
    gradient_norm: float = 0.0
    # Mean over the last whole epoch.
    train_loss: float | None = None
    # The last evaluation, and the step it was made after.
    evaluation: dict[str, int | float] = field(default_factory=dict)
    evaluated_step: int = -1
    best_accuracy: float = 0.0
    tracker_id: str | None = None
    # State of the fp16 loss scaler.
    scaler: dict[str, Any] | None = None
    # Fingerprint of the data set.
    data: str = ""

    @property
    def window_is_open(self) -> bool:
        """Whether images were trained on since the last row."""
        return self.window.images > 0
