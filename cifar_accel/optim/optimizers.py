"""Optimizers by name, their parameter groups, and what they keep for each weight."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm.optim
import torch
from torch.utils._pytree import tree_leaves

from cifar_accel.errors import BadInput, did_you_mean, first_line
from cifar_accel.optim.schedules import check_schedule
from cifar_accel.options.options import TrainingArguments

# A new optimizer is one line here: a function of the parameter groups and the options. Those of
# timm need none. The loop sets the rate before each step, and the groups hold the weight decay.
OPTIMIZERS: dict[str, Callable[[Any, TrainingArguments], torch.optim.Optimizer]] = {
    "adamw": lambda groups, args: torch.optim.AdamW(
        groups, args.learning_rate, amsgrad=args.amsgrad, fused=True
    ),
    "sgdm": lambda groups, args: torch.optim.SGD(
        groups, args.learning_rate, momentum=args.momentum, fused=True
    ),
}


def check_names(args: TrainingArguments) -> None:
    """Raise BadInput for a schedule or optimizer that does not exist or cannot be driven so."""
    check_schedule(args)
    if args.optimizer in OPTIMIZERS:
        return
    of_timm = timm.optim.list_optimizers()
    if args.optimizer not in of_timm:
        near = did_you_mean(args.optimizer, OPTIMIZERS) or did_you_mean(args.optimizer, of_timm)
        raise BadInput(
            f"--optimizer {args.optimizer}: unknown; there are adamw, sgdm and timm's, "
            f"such as lamb, lion and muon{near}"
        )
    info = timm.optim.get_optimizer_info(args.optimizer)
    if args.momentum != TrainingArguments.momentum and not info.has_momentum:
        raise BadInput(f"--momentum has no effect on --optimizer {args.optimizer}, which has none")
    if info.second_order:
        raise BadInput(f"--optimizer {args.optimizer}: needs second derivatives, unknown here")


def parameter_groups(model: Any, args: TrainingArguments) -> list[dict[str, Any]]:
    """Parameter groups of `model`: one, or with --no-decay-all a second one that is not decayed.

    With --layer-decay each layer has its own, with an `lr_scale` of decay^n, where n layers come
    after it (Clark et al. 2020, "ELECTRA"; timm says what a model's layers are).
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # The report's way is to decay all.
    spared = set() if args.decay_all else undecayed(model)
    if args.layer_decay < 1:
        return timm.optim.param_groups_layer_decay(
            model,
            args.weight_decay,
            no_weight_decay_list=spared,
            weight_decay_exclude_1d=False,
            layer_decay=args.layer_decay,
        )
    groups = [
        {
            "params": [p for name, p in named.items() if name not in spared],
            "weight_decay": args.weight_decay,
        },
        {"params": [p for name, p in named.items() if name in spared], "weight_decay": 0.0},
    ]
    # An empty group is refused by some optimizers.
    return [group for group in groups if group["params"]]


def undecayed(model: Any) -> set[str]:
    """Names of the parameters without weight decay: biases, norms, gains and what `model` lists.

    Gains are NFNet's four-dimensional `gain` and scalar `skipinit_gain`; listed are tokens,
    position embeddings and the like.
    """
    listed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    small = {name for name, p in model.named_parameters() if p.ndim <= 1 or name.endswith("gain")}
    return small | listed


def build_optimizer(model: torch.nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer over what is trained. Raises BadInput when timm's cannot be made so or here."""
    groups = parameter_groups(model, args)
    if args.optimizer in OPTIMIZERS:
        return OPTIMIZERS[args.optimizer](groups, args)
    try:
        return timm.optim.create_optimizer_v2(
            groups, args.optimizer, lr=args.learning_rate, momentum=args.momentum
        )
    # Some need a GPU or a package, others refuse values.
    except (RuntimeError, TypeError, ValueError, AssertionError, ImportError) as e:
        raise BadInput(f"--optimizer {args.optimizer}: cannot be made: {first_line(e)}") from e


def moments_per_weight(args: TrainingArguments, device: torch.device | None = None) -> int:
    """How many numbers the optimizer keeps for each weight, such as adamw's two moments.

    Counted after one step on a small matrix on `device` (unset: the CPU). Numbers of a row or
    column, as adafactor keeps, are not counted. Raises BadInput like `build_optimizer`.
    """
    # Large enough for those that keep rows and columns in place of a matrix.
    weight = torch.nn.Parameter(torch.ones(64, 64, device=device))
    # Most make what they keep in their first step.
    one_layer = replace(args, layer_decay=1.0)
    optimizer = build_optimizer(torch.nn.ParameterList([weight]), one_layer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    # An optimizer may keep tensors by name or in lists.
    kept = tree_leaves(optimizer.state[weight])
    numbers = sum(value.numel() for value in kept if torch.is_tensor(value))
    return numbers // weight.numel()
