"""What follows from options for others, and what contradicts: parsed options -> resolved ones with their origin."""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from cifar_accel.errors import BadInput
from cifar_accel.files import home
from cifar_accel.options.options import TrainingArguments, flag
from cifar_accel.options.recipes import RECIPES
from cifar_accel.options.values import parse_duration, parse_interval, parse_keywords

# Options that do nothing by themselves: what each needs, and whether it is there. Given in vain, it is an error.
NEEDS: dict[str, tuple[str, Callable[[TrainingArguments], bool]]] = {
    "amsgrad": ("--optimizer adamw", lambda a: a.optimizer == "adamw"),
    "color_jitter": (
        "--aa none (timm leaves it out beside a policy)",
        lambda a: a.aa == "none" or "3a" in a.aa,
    ),
    "alternating_flip": (
        "--hflip 0.5 and --pipeline device",
        lambda a: a.hflip == 0.5 and a.pipeline == "device",
    ),
    "compile_mode": ("--compile", lambda a: a.compile),
    "momentum": ("an optimizer that has one", lambda a: a.optimizer != "adamw"),
    "mixup_prob": ("--mixup or --cutmix", lambda a: bool(a.mixup or a.cutmix)),
    "clip_mode": ("--clip-grad", lambda a: a.clip_grad > 0),
    "model_ema_decay": ("--model-ema", lambda a: a.model_ema),
    "ratio": ("--scale", lambda a: a.scale is not None),
    "workers": ("--pipeline timm", lambda a: a.pipeline == "timm"),
    "min_lr": ("--scheduler cosine", lambda a: a.scheduler == "cosine"),
    "warmup_lr": ("a warm-up", lambda a: a.warmup_epochs != 0 and a.scheduler != "one_cycle"),
}


def resolve(args: TrainingArguments, given: set[str]) -> tuple[TrainingArguments, dict[str, str]]:
    """Fill in what follows from other options and check the whole.

    Args:
        args: the options as parsed, with the recipe's defaults underneath.
        given: the fields that the user set by a flag.

    Returns:
        The resolved options and, by field, where each value comes from: default, recipe, flag or derived.

    Raises:
        BadInput: an option is out of range, or two contradict each other; the message names the flags.
    """
    recipe = RECIPES[args.recipe]
    origin = {
        f.name: "flag" if f.name in given else "recipe" if f.name in recipe else "default"
        for f in fields(args)
    }

    def derive(**values: Any) -> None:
        nonlocal args
        args = replace(args, **values)
        origin.update(dict.fromkeys(values, "derived"))

    check_ranges(args)
    # A path means the same from wherever the run is continued or evaluated.
    if os.path.isdir(home(args.dataset)):
        args = replace(args, dataset=os.path.abspath(home(args.dataset)))
    if args.model.startswith("local-dir:"):
        args = replace(
            args, model="local-dir:" + os.path.abspath(home(args.model.removeprefix("local-dir:")))
        )
    if args.checkpoint:
        args = replace(args, checkpoint=os.path.abspath(home(args.checkpoint)))
    if args.resume not in ("auto", "never"):
        args = replace(args, resume=os.path.abspath(home(args.resume)))
    if args.warmup_epochs is None:
        share = {"linear_decay": 0.0, "constant": 0.0, "one_cycle": 0.3}.get(args.scheduler, 0.2)
        derive(warmup_epochs=round(args.epochs * share, 4))
    elif args.warmup_epochs > args.epochs:
        raise BadInput(
            f"--warmup-epochs {args.warmup_epochs:g}: longer than the run (--epochs {args.epochs})"
        )
    if args.crop_padding and args.scale:
        if {"crop_padding", "scale"} <= given:
            raise BadInput(
                "--crop-padding and --scale are two kinds of random crop: give one of them"
            )
        derive(**({"scale": None} if "crop_padding" in given else {"crop_padding": 0}))
    if args.checkpoint and args.pretrained and not args.model.startswith("local-dir:"):
        if "pretrained" in given:
            raise BadInput(
                "--pretrained and --checkpoint both name weights to start from: give one of them"
            )
        derive(pretrained=False)
    if args.aa != "none":
        derive(**check_policy(args, given))
    for name, (needed, has_effect) in NEEDS.items():
        if not has_effect(args):
            if name in given:
                raise BadInput(f"{flag(name)} has no effect without {needed}")
            if getattr(args, name) != getattr(
                TrainingArguments, name
            ):  # the recipe set it for another choice
                derive(**{name: getattr(TrainingArguments, name)})
    if args.run_name is None:
        slug = os.path.basename(args.model.removeprefix("local-dir:").rstrip("/")) or "model"
        derive(run_name=f"{slug}/{args.optimizer}-{args.scheduler}-s{args.seed}")
    return args, origin


def check_policy(args: TrainingArguments, given: set[str]) -> dict[str, Any]:
    """Read --aa; returns {"pipeline": "timm"} for a policy that only timm has, unless the user chose a pipeline.

    Raises BadInput for a policy that cannot be read, or that the chosen pipeline lacks.
    """
    from cifar_accel.options.policy import read_policy

    kind = args.aa.split("-")[0]
    if kind not in ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a"):
        raise BadInput(
            f"--aa {args.aa}: unknown; timm has rand-..., augmix-..., original, originalr, v0, v0r and 3a"
        )
    if kind == "rand" and read_policy(args.aa).choice in ("", "weights"):
        return {}
    if args.pipeline == "device" and "pipeline" in given:
        raise BadInput(
            f"--aa {args.aa} needs --pipeline timm (the device pipeline has rand-... without t3a and t3aw)"
        )
    return {"pipeline": "timm"} if args.pipeline == "device" else {}


def check_ranges(args: TrainingArguments) -> None:
    """Raise BadInput for the first option outside its range; the message is one line that names the flag."""
    positive = "epochs batch_size micro_batch_size learning_rate image_size log_every keep_checkpoints crop_pct"
    not_negative = (
        "warmup_epochs workers limit_train limit_test max_steps profile seed weight_decay momentum warmup_lr "
        "min_lr clip_grad crop_padding mixup cutmix color_jitter"
    )
    for name in [*positive.split(), *not_negative.split()]:
        value = getattr(args, name)
        largest = (
            2**63 - 1 if name == "seed" else 10**9 if isinstance(value, int) else sys.float_info.max
        )
        if value is not None and not value <= largest:
            raise BadInput(f"{flag(name)} {str(value)[:20]}: is no number that this can mean")
    for name in positive.split():
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise BadInput(f"{flag(name)} {value:g}: must be greater than 0")
    for name in not_negative.split():
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise BadInput(f"{flag(name)} {value:g}: must be 0 or greater")
    for name in [
        "hflip",
        "vflip",
        "reprob",
        "mixup_prob",
        "smoothing",
        "model_ema_decay",
        "crop_pct",
    ]:
        if not 0 <= getattr(args, name) <= 1:
            raise BadInput(f"{flag(name)} {getattr(args, name):g}: must lie between 0 and 1")
    if not 0 <= args.validation_fraction < 1:
        raise BadInput(
            f"--validation-fraction {args.validation_fraction:g}: must be at least 0 and below 1"
        )
    if args.smoothing == 1:
        raise BadInput("--smoothing 1: must be below 1")
    if args.save_epochs == 0 or args.save_epochs < -1:
        raise BadInput(
            f"--save-epochs {args.save_epochs}: must be -1 (the last epoch only) or greater than 0"
        )
    for name, low, high in (("scale", 0.0, 1.0), ("ratio", 0.0, float("inf"))):
        pair, bound = getattr(args, name), " and at most 1" if high == 1 else ""
        if (pair and not low < pair[0] <= pair[1] <= high) or (pair and pair[1] == float("inf")):
            raise BadInput(
                f"{flag(name)} {pair[0]:g} {pair[1]:g}: must be an increasing pair above 0{bound}"
            )
    if args.std and not all(0 < value < float("inf") for value in args.std):
        raise BadInput(f"--std {args.std}: every deviation must be greater than 0")
    if args.mean and not all(map(math.isfinite, args.mean)):
        raise BadInput(f"--mean {args.mean}: every mean must be finite")
    parse_interval(args.save_every)
    parse_duration(args.max_time or "1s")
    parse_keywords(args.model_kwargs)
    run = args.run_name
    if run is not None and max(map(len, os.fsencode(run).split(b"/"))) > 250:
        raise BadInput(f"--run-name {run[:40]}...: File name too long")
    if run is not None and (
        os.path.isabs(run) or ".." in run.split("/") or os.path.normpath(run) == "."
    ):
        raise BadInput(
            f"--run-name {run}: must be a relative path without '..' (it lies below --save-dir)"
        )
