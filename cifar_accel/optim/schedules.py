"""Learning rates as functions of the optimizer step. Loads no torch: a plan of a run asks here."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from cifar_accel.errors import BadInput, did_you_mean
from cifar_accel.options.options import TrainingArguments


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes on after a linear warm-up to its peak, `args.learning_rate`."""

    # Learning rate by the share of the way: 0 at the end of the warm-up, 1 at the last step.
    rate: Callable[[float, TrainingArguments], float]
    # Learning rate at the first step of the warm-up.
    warmup_start: Callable[[TrainingArguments], float] = lambda args: args.warmup_lr


# ---- the schedules; each takes the share of the way and the options


def _cosine(share: float, args: TrainingArguments) -> float:
    """Loshchilov & Hutter 2016, one cycle without restarts, down to --min-lr."""
    above = args.learning_rate - args.min_lr
    return args.min_lr + above * (1 + math.cos(math.pi * share)) / 2


def _one_cycle(share: float, args: TrainingArguments) -> float:
    """Smith & Topin 2018, down to 1/250,000 of the peak as torch's OneCycleLR does by default."""
    last = 4e-6
    return args.learning_rate * (last + (1 - last) * (1 + math.cos(math.pi * share)) / 2)


# A new schedule is one entry here: any function of the share of the way and the options.
SCHEDULES = {
    "cosine": Schedule(_cosine),
    # torch's LinearLR with an end factor of 0.001.
    "linear_decay": Schedule(lambda share, args: args.learning_rate * (1 - 0.999 * share)),
    "constant": Schedule(lambda share, args: args.learning_rate),
    # It starts as torch's OneCycleLR does by default.
    "one_cycle": Schedule(_one_cycle, warmup_start=lambda args: args.learning_rate / 25),
}


# ---- what the rest of the package asks


def check_schedule(args: TrainingArguments) -> None:
    """Raise BadInput for a schedule that does not exist, naming the nearest."""
    if args.scheduler not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        near = did_you_mean(args.scheduler, SCHEDULES)
        raise BadInput(f"--scheduler {args.scheduler}: unknown; there are {known}{near}")


def learning_rate(step: int, total_steps: int, warmup_steps: int, args: TrainingArguments) -> float:
    """Learning rate of optimizer step `step`, counted from 0, in a run of `total_steps`."""
    schedule = SCHEDULES[args.scheduler]
    if step < warmup_steps:
        start = schedule.warmup_start(args)
        return start + (args.learning_rate - start) * step / warmup_steps
    # A run may be over with its warm-up: then there is no way to share.
    steps_left = max(1, total_steps - 1 - warmup_steps)
    return schedule.rate((step - warmup_steps) / steps_left, args)
