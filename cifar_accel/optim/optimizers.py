"""Optimizers by name, and their parameter groups."""

from collections.abc import Callable
from typing import Any

import timm
import timm.optim
import torch

from cifar_accel.errors import BadInput, did_you_mean
from cifar_accel.optim.schedules import SCHEDULES
from cifar_accel.options.options import TrainingArguments

# A new optimizer is one line here: a function of the parameter groups and the options.
OPTIMIZERS: dict[str, Callable[[Any, TrainingArguments], torch.optim.Optimizer]] = {
    "adamw": lambda groups, a: torch.optim.AdamW(
        groups, a.learning_rate, amsgrad=a.amsgrad, fused=True
    ),
    "sgdm": lambda groups, a: torch.optim.SGD(
        groups, a.learning_rate, momentum=a.momentum, fused=True
    ),
}


def check_names(args: TrainingArguments) -> None:
    """Raise BadInput for an optimizer or schedule that does not exist, naming the nearest."""
    if args.scheduler not in SCHEDULES:
        there = ", ".join(SCHEDULES)
        raise BadInput(
            f"--scheduler {args.scheduler}: unknown; there are {there}{did_you_mean(args.scheduler, SCHEDULES)}"
        )
    if args.optimizer in OPTIMIZERS:
        return
    if args.optimizer in timm.optim.list_optimizers():
        if timm.optim.get_optimizer_info(args.optimizer).second_order:
            raise BadInput(
                f"--optimizer {args.optimizer}: needs second derivatives, which this loop does not compute"
            )
    else:
        near = did_you_mean(args.optimizer, OPTIMIZERS) or did_you_mean(
            args.optimizer, timm.optim.list_optimizers()
        )
        raise BadInput(
            f"--optimizer {args.optimizer}: unknown; there are adamw, sgdm and timm's{near}"
        )


def parameter_groups(model: Any, args: TrainingArguments) -> list[dict[str, Any]]:
    """Parameter groups of `model`: one, or with --no-decay-all a second, undecayed one.

    Spared are biases, norms and gains (NFNet's four-dimensional `gain` and scalar `skipinit_gain` too) and what the
    model itself lists, such as position embeddings.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if args.decay_all:
        return [{"params": [p for _, p in named], "weight_decay": args.weight_decay}]
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    spared = {
        n for n, p in named if p.ndim <= 1 or n in listed or n.rpartition(".")[2].endswith("gain")
    }
    return [
        {"params": [p for n, p in named if n not in spared], "weight_decay": args.weight_decay},
        {"params": [p for n, p in named if n in spared], "weight_decay": 0.0},
    ]


def build_optimizer(model: torch.nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer named by the options. Raises BadInput when timm's cannot be made with them."""
    groups = [g for g in parameter_groups(model, args) if g["params"]]
    if args.optimizer in OPTIMIZERS:
        return OPTIMIZERS[args.optimizer](groups, args)
    try:
        return timm.optim.create_optimizer_v2(
            groups, args.optimizer, lr=args.learning_rate, momentum=args.momentum
        )
    except (RuntimeError, TypeError, ValueError, AssertionError, ImportError) as e:
        raise BadInput(
            f"--optimizer {args.optimizer}: cannot be made: {str(e).splitlines()[0]}"
        ) from e
