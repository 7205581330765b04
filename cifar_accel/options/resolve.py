"""Options as given -> options as they hold: what follows from others, and what contradicts."""

import os
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

from cifar_accel.errors import BadInput
from cifar_accel.files import home
from cifar_accel.options.options import BUILT_IN, TrainingArguments, flag
from cifar_accel.options.policy import read_policy
from cifar_accel.options.recipes import RECIPES
from cifar_accel.options.values import parse_duration, parse_interval, parse_keywords

# The policies of --aa, by the first part of their names in timm.
POLICIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")

# Warm-up where none is given, as a share of the epochs: of cosine and others, and of these.
USUAL_WARMUP_SHARE = 0.2
WARMUP_SHARES = {"linear_decay": 0.0, "constant": 0.0, "one_cycle": 0.3}

# Most bytes in a part of a run's name: file systems take 255, and some files beside it are longer.
LONGEST_NAME = 250

# Learning rate where none is given, over that of adamw: what these optimizers are usually given.
# timm's muon is scaled to take adamw's.
RATE_FACTORS = {"sgdm": 40.0, "sgd": 40.0, "lion": 0.2, "muon": 1.0}

# What a rule makes of the options: new values by field.
Derived = dict[str, Any]
# Where each value comes from, by field: default, recipe, flag or derived.
Origin = dict[str, str]


class Need(NamedTuple):
    """What an option needs to have an effect, in words and as a question to the options."""

    words: str
    is_met: Callable[[TrainingArguments], bool]


# Options that do nothing by themselves. To give one in vain is an error.
NEEDS = {
    "amsgrad": Need("--optimizer adamw", lambda args: args.optimizer == "adamw"),
    # Beside most policies timm leaves colour jitter out, but not beside its set of three (3a).
    "color_jitter": Need(
        "--aa none (timm leaves it out beside a policy)",
        lambda args: args.aa == "none" or "3a" in args.aa,
    ),
    "alternating_flip": Need(
        "--hflip 0.5 and --pipeline device",
        lambda args: args.hflip == 0.5 and args.pipeline == "device",
    ),
    "budget": Need("--recipe finetune", lambda args: args.recipe == "finetune"),
    "plan_of": Need("--budget", lambda args: args.budget is not None),
    "compile_mode": Need("--compile", lambda args: args.compile),
    "momentum": Need("an optimizer that has one", lambda args: args.optimizer != "adamw"),
    "mixup_prob": Need("--mixup or --cutmix", lambda args: args.mixup > 0 or args.cutmix > 0),
    "log_model": Need("--tracker wandb", lambda args: args.tracker != "none"),
    "clip_mode": Need("--clip-grad", lambda args: args.clip_grad > 0),
    "model_ema_decay": Need("--model-ema", lambda args: args.model_ema),
    "ratio": Need("--scale", lambda args: args.scale is not None),
    "workers": Need("--pipeline timm", lambda args: args.pipeline == "timm"),
    "min_lr": Need("--scheduler cosine", lambda args: args.scheduler == "cosine"),
    # one_cycle has a start of its own.
    "warmup_lr": Need(
        "a warm-up", lambda args: args.warmup_epochs != 0 and args.scheduler != "one_cycle"
    ),
}

# Those of them of which finetune knows only once it has the model.
NEEDS_THE_MODEL = ("mixup_prob", "clip_mode")


def resolve(args: TrainingArguments, given: set[str]) -> tuple[TrainingArguments, Origin]:
    """Fill in what follows from other options and check the whole.

    `args` are as parsed, with the recipe's defaults underneath; `given` are the fields that the
    user set by a flag. Returns the resolved options and their origin. Raises BadInput, which names
    the flags.
    """
    check_values(args)

    # Where each value comes from so far. Any flag outdoes the recipe, also with the recipe's value.
    origin = {field.name: "default" for field in fields(args)}
    origin.update(dict.fromkeys(RECIPES[args.recipe], "recipe"))
    origin.update(dict.fromkeys(given, "flag"))

    # The origin of a path stays, for it is still what the user said.
    args = replace(args, **absolute_paths(args))

    # Each rule sees what those before it have derived.
    rules = (
        learning_rate,
        warmup,
        one_kind_of_crop,
        weights_to_finetune,
        one_length,
        one_source_of_weights,
        pipeline,
        without_effect,
        run_name,
    )
    for rule in rules:
        derived = rule(args, given)
        args = replace(args, **derived)
        origin.update(dict.fromkeys(derived, "derived"))
    return args, origin


def with_derived(
    args: TrainingArguments, origin: Origin, values: Derived
) -> tuple[TrainingArguments, Origin]:
    """The options with `values` where no flag says otherwise, and where each comes from."""
    new = {name: value for name, value in values.items() if origin[name] != "flag"}
    return replace(args, **new), origin | dict.fromkeys(new, "derived")


def check_values(args: TrainingArguments) -> None:
    """Raise BadInput for the first option that is wrong by itself and that no bound describes."""
    # -1 is a word for the last epoch, so that this is no range.
    if args.save_epochs == 0 or args.save_epochs < -1:
        raise BadInput(
            f"--save-epochs {args.save_epochs}: must be -1 (the last epoch only) or greater than 0"
        )

    # From the least to the largest.
    for name, pair in (("--scale", args.scale), ("--ratio", args.ratio)):
        if pair and pair[0] > pair[1]:
            raise BadInput(f"{name} {pair[0]:g} {pair[1]:g}: must be an increasing pair")

    # Texts: to read them is to check them.
    parse_interval(args.save_every)
    if args.max_time is not None:
        parse_duration(args.max_time)
    if args.budget is not None:
        parse_duration(args.budget, "--budget")
    parse_keywords(args.model_kwargs)
    if args.run_name is not None:
        check_run_name(args.run_name)


def check_run_name(name: str) -> None:
    """Raise BadInput unless `name` is that of a folder below --save-dir."""
    parts = name.split("/")
    # File systems count bytes, not characters.
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
        raise BadInput(f"--run-name {name[:40]}...: File name too long")
    if re.search(r"[\x00-\x1f\x7f-\x9f]", name):
        raise BadInput(f"--run-name {name!r}: holds a control character, such as a newline")
    if os.path.isabs(name) or ".." in parts or os.path.normpath(name) == ".":
        raise BadInput(f"--run-name {name}: must be a relative path below --save-dir, without '..'")


def absolute_paths(args: TrainingArguments) -> Derived:
    """Paths that mean the same from wherever the run is continued or evaluated."""
    paths: Derived = {}
    # What is no folder here is the name of a data set, and is read later. Those of our own come
    # before folders of the same name.
    if args.dataset not in BUILT_IN and os.path.isdir(home(args.dataset)):
        paths["dataset"] = os.path.abspath(home(args.dataset))
    if args.model.startswith("local-dir:"):
        folder = home(args.model.removeprefix("local-dir:"))
        paths["model"] = "local-dir:" + os.path.abspath(folder)
    if args.checkpoint:
        paths["checkpoint"] = os.path.abspath(home(args.checkpoint))
    if args.resume not in ("auto", "never"):
        paths["resume"] = os.path.abspath(home(args.resume))
    return paths


def learning_rate(args: TrainingArguments, given: set[str]) -> Derived:
    """A learning rate that nobody gave follows the optimizer; the report keeps its own."""
    factor = RATE_FACTORS.get(args.optimizer)
    if "learning_rate" in given or args.recipe == "report" or factor is None:
        return {}
    return {"learning_rate": float(f"{args.learning_rate * factor:.3g}")}


def warmup(args: TrainingArguments, given: set[str]) -> Derived:
    """The length of the warm-up, where it is not given: a share of the epochs by schedule."""
    if args.warmup_epochs is None:
        # In epochs, and rounded for who reads it: 0.6 and not 0.6000000000000001.
        share = WARMUP_SHARES.get(args.scheduler, USUAL_WARMUP_SHARE)
        return {"warmup_epochs": round(args.epochs * share, 4)}
    # How many epochs a budget takes is not known yet.
    if args.budget and "epochs" not in given:
        return {}
    if args.warmup_epochs > args.epochs:
        raise BadInput(
            f"--warmup-epochs {args.warmup_epochs:g}: longer than the run (--epochs {args.epochs})"
        )
    return {}


def one_kind_of_crop(args: TrainingArguments, given: set[str]) -> Derived:
    """The recipe's kind of random crop yields to the other kind when the user asks for that."""
    if not args.crop_padding or not args.scale:
        return {}
    if {"crop_padding", "scale"} <= given:
        raise BadInput("--crop-padding and --scale are two kinds of random crop: give one of them")
    # Here one of them is the recipe's.
    if "crop_padding" in given:
        return {"scale": None}
    return {"crop_padding": 0}


def weights_to_finetune(args: TrainingArguments, given: set[str]) -> Derived:
    """The recipe finetune starts from weights."""
    if args.recipe == "finetune" and not args.pretrained and not args.checkpoint:
        raise BadInput(
            "--recipe finetune: needs weights to start from, and --no-pretrained says without; "
            "--recipe plain trains from nothing"
        )
    return {}


def one_length(args: TrainingArguments, given: set[str]) -> Derived:
    """--budget chooses sizes, epochs or both, and is the only end of the run."""
    if args.budget is None:
        return {}
    if {"image_size", "epochs"} <= given:
        raise BadInput("--budget chooses --image-size, --epochs or both: do not give both of them")
    if args.max_time or args.max_steps:
        raise BadInput("--budget fits the run to its time: leave --max-time and --max-steps away")
    return {}


def one_source_of_weights(args: TrainingArguments, given: set[str]) -> Derived:
    """The published weights are not downloaded when --checkpoint replaces them."""
    # The weights of a local-dir are no download.
    if not args.checkpoint or not args.pretrained or args.model.startswith("local-dir:"):
        return {}
    if "pretrained" in given:
        raise BadInput("--pretrained and --checkpoint both name weights: give one of them")
    return {"pretrained": False}


def pipeline(args: TrainingArguments, given: set[str]) -> Derived:
    """A policy that only timm has takes the timm pipeline, unless the user chose the other."""
    if args.aa == "none":
        return {}
    kind = args.aa.split("-")[0]
    if kind not in POLICIES:
        raise BadInput(
            f"--aa {args.aa}: unknown; "
            "timm has rand-..., augmix-..., original, originalr, v0, v0r and 3a"
        )
    # Of the rand-... policies, timm alone has those that choose from its sets of three (t3a, t3aw).
    if kind == "rand" and read_policy(args.aa).choice in ("", "weights"):
        return {}
    if args.pipeline == "timm":
        return {}
    if "pipeline" in given:
        raise BadInput(
            f"--aa {args.aa} needs --pipeline timm "
            "(the device pipeline has rand-... without t3a and t3aw)"
        )
    return {"pipeline": "timm"}


def without_effect(args: TrainingArguments, given: set[str]) -> Derived:
    """An option without what it needs is an error; set by the recipe, it yields to its default."""
    derived = {}
    for name, need in NEEDS.items():
        # The recipe finetune may mix and clip, by the model.
        is_known_later = args.recipe == "finetune" and name in NEEDS_THE_MODEL
        if need.is_met(args) or is_known_later:
            continue
        if name in given:
            raise BadInput(f"{flag(name)} has no effect without {need.words}")
        # The recipe set it for another choice than the user's.
        default = getattr(TrainingArguments, name)
        if getattr(args, name) != default:
            derived[name] = default
    return derived


def check_effects(args: TrainingArguments, origin: Origin) -> None:
    """Raise BadInput for a flag whose effect hung on the model, and that has none."""
    for name in NEEDS_THE_MODEL:
        if origin[name] == "flag" and not NEEDS[name].is_met(args):
            raise BadInput(f"{flag(name)} has no effect on this model without {NEEDS[name].words}")


def run_name(args: TrainingArguments, given: set[str]) -> Derived:
    """The name of the run folder, where it is not given: MODEL/OPTIMIZER-SCHEDULER-sSEED."""
    if args.run_name is not None:
        return {}
    # Of a local-dir the last part of its path, unless that is the root.
    model = os.path.basename(args.model.removeprefix("local-dir:").rstrip("/")) or "model"
    name = f"{model}/{args.optimizer}-{args.scheduler}-s{args.seed}"
    # The runs of a sweep of wandb may differ in any option. Its agents give each an id.
    if os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
        name += f"-{os.environ['WANDB_RUN_ID']}"
    return {"run_name": name}
