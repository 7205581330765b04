"""Learning rates as functions of the optimizer step."""

import math
from collections.abc import Callable

from cifar_accel.options.options import TrainingArguments

# A new schedule is one line here: the share of the way (0 at the end of the warm-up, 1 at the last step) -> rate.
SCHEDULES: dict[str, Callable[[float, TrainingArguments], float]] = {
    "cosine": lambda t, a: (
        a.min_lr + (a.learning_rate - a.min_lr) * (1 + math.cos(math.pi * t)) / 2
    ),
    "linear_decay": lambda t, a: (
        a.learning_rate * (1 - 0.999 * t)
    ),  # torch's LinearLR with an end factor of 0.001
    "constant": lambda t, a: a.learning_rate,
    # Smith & Topin 2018 with the default rates of torch's OneCycleLR: from 1/25 up, then by a cosine to 1/250,000
    "one_cycle": lambda t, a: (
        a.learning_rate * (4e-6 + (1 - 4e-6) * (1 + math.cos(math.pi * t)) / 2)
    ),
}


def learning_rate(step: int, total_steps: int, warmup_steps: int, args: TrainingArguments) -> float:
    """Learning rate of optimizer step `step` (from 0) in a run of `total_steps`: linear warm-up, then the schedule."""
    if step < warmup_steps:
        start = args.learning_rate / 25 if args.scheduler == "one_cycle" else args.warmup_lr
        return start + (args.learning_rate - start) * step / warmup_steps
    return SCHEDULES[args.scheduler](
        (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps), args
    )
