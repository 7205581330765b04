"""Every option once: typed, with its doc line, default, unit and validation; and the recipes.

`TrainingArguments` is the command line, the help text, the documentation and `config.json` at once. This module
imports nothing heavy, so that `--help` and every usage error answer at once.
"""

import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# What each recipe changes in the defaults of TrainingArguments. A new recipe is one entry here.
RECIPES: dict[str, dict[str, Any]] = {
    # The course report's setting (AdamW with amsgrad, timm's m15 augmentation, both flips, batch Mixup, a test border
    # cut away). Two slips of its scheduler are mended: the warm-up there repeated its first epoch and its peak stayed
    # at 4.52e-4; here the rate warms up to --learning-rate and falls from there, step by step.
    "report": dict(
        aa="rand-m15-n2",
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        vflip=0.5,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        crop_pct=0.875,
        mixup=0.8,
        mixup_prob=0.7,
        smoothing=0.1,
        amsgrad=True,
    ),
    # What most CIFAR papers do: reflect-padded crop, horizontal flip, label smoothing, decay on weights only.
    "plain": dict(crop_padding=4, hflip=0.5, smoothing=0.1, decay_all=False),
    # Small pictures of signs, where a flip changes the meaning.
    "digits": dict(smoothing=0.1, decay_all=False),
}


@dataclass(frozen=True)
class TrainingArguments:
    """Fine-tune or train a timm model on CIFAR-100 (or another image set) on one or more devices."""

    # What is trained
    model: str = "nfnet"
    """nfnet, vit, any timm model name, or local-dir:PATH (a folder with config.json and model.safetensors)."""
    pretrained: bool = True
    """Start from the model's published weights (a download, unless the model is a local-dir)."""
    checkpoint: str | None = None
    """Weights to start from: a run folder, a .safetensors or a .pth file; replaces the published weights."""
    model_kwargs: tuple[str, ...] = ()
    """Further arguments of the timm model, as name=value, for example patch_size=4 drop_path_rate=0.1."""
    image_size: int = 32
    """Side of the square model input in pixels; images are resized to it."""

    # Data
    dataset: str = "cifar100"
    """cifar100, cifar10, digits, a folder (hub parquet layout, or train/CLASS/*.png), or a hub id."""
    data_dir: str = "~/.cache/cifar_accel"
    """Where downloads and the decoded arrays are kept."""
    limit_train: int = 0
    """Use this many training images, a seeded stratified subset (0: all)."""
    limit_test: int = 0
    """Use this many test images, a seeded stratified subset (0: all)."""
    validation_fraction: float = 0.0
    """Share of the training images held out, by class, for the evaluations; the test set is read once, at the end."""
    pipeline: Literal["device", "timm"] = "device"
    """Input: device (images live on the device, augmented there in batches) or timm (PIL transforms in workers)."""
    workers: int | None = None
    """Worker processes of the timm pipeline per training process (unset: 8, or fewer where there are fewer cores)."""

    # Augmentation, loss: timm's flag names; none or 0 turns one off
    aa: str = "none"
    """AutoAugment policy in timm's notation, for example rand-m15-n2."""
    scale: tuple[float, float] | None = None
    """Area range of the random resized crop, as a share of the image; none: no such crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect range of the random resized crop."""
    crop_padding: int = 0
    """Random crop of the image padded by this many reflected pixels (in place of the random resized crop)."""
    hflip: float = 0.0
    """Probability of a left-right flip."""
    vflip: float = 0.0
    """Probability of an upside-down flip."""
    alternating_flip: bool = False
    """Flip every image left-right in every other epoch, at random in the first, in place of --hflip's coin."""
    color_jitter: float = 0.0
    """Range of random brightness, contrast and saturation (0.4 means a factor of 0.6 to 1.4)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling when an image is resized."""
    crop_pct: float = 1.0
    """Test images are resized to image_size / crop_pct and cut to the centre (1: nothing is cut)."""
    mean: tuple[float, float, float] | None = None
    """Channel means subtracted from images scaled to [0, 1]; none: the model's own."""
    std: tuple[float, float, float] | None = None
    """Channel deviations divided by; none: the model's own."""
    reprob: float = 0.0
    """Probability that a random rectangle of an image is erased (set to the mean)."""
    mixup: float = 0.0
    """Mixup alpha."""
    cutmix: float = 0.0
    """CutMix alpha; with Mixup too, each batch takes one of them, half and half."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed."""
    smoothing: float = 0.0
    """Label smoothing."""
    bce_loss: bool = False
    """Binary cross-entropy over the classes in place of softmax cross-entropy."""

    # Optimization
    epochs: int = 25
    """Passes over the training set."""
    batch_size: int = 256
    """Images in one optimizer step, over all processes and accumulation steps."""
    micro_batch_size: int | None = None
    """Most images that one device takes at once; accumulation follows from it (unset: no limit)."""
    optimizer: str = "adamw"
    """adamw, sgdm, or another optimizer of timm by name."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    weight_decay: float = 1e-2
    """Weight decay."""
    decay_all: bool = True
    """Decay every parameter; else gains, biases, norms and position embeddings are spared."""
    momentum: float = 0.9
    """Momentum of sgdm (and of timm's optimizers that have one)."""
    amsgrad: bool = False
    """The amsgrad form of adamw."""
    scheduler: str = "cosine"
    """cosine, linear_decay, constant or one_cycle; a function of the optimizer step."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up (unset: epochs / 5; 0 for linear_decay and constant; 0.3 epochs for one_cycle)."""
    warmup_lr: float = 1e-5
    """Learning rate at the first step of a warm-up."""
    min_lr: float = 1e-6
    """Learning rate at the end of cosine."""
    clip_grad: float = 0.0
    """Gradient clipping: the largest norm, value, or (agc) ratio to the weights' norm; 0: none."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """How gradients are clipped; agc is NFNet's adaptive clipping (0.01 is usual), which spares the classifier."""
    model_ema: bool = False
    """Keep an exponential moving average of the weights; it is what is evaluated and saved."""
    model_ema_decay: float = 0.9998
    """Decay of that average per step."""

    # Run
    seed: int = 3407
    """Everything random follows from it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, else mps, else cpu."""
    compile: bool = False
    """Compile the model with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """torch.compile's mode; reduce-overhead replays the step as a CUDA graph."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Layout of images and weights; auto takes what was measured to be faster for the model's family and device."""
    max_steps: int = 0
    """Stop after this many optimizer steps (0: no limit); the schedule is not rescaled."""
    max_time: str | None = None
    """Stop in order, with a checkpoint, at the first step after so long since the start: 90m, 2h, 1h30m."""
    log_every: int = 50
    """Optimizer steps between two log lines."""
    dry_run: bool = False
    """Print what would be trained, where every value comes from, and what is amiss on this machine; train nothing."""
    profile: int = 0
    """Trace this many optimizer steps, after 3 of warm-up, with torch's profiler into profile/ of the run folder."""

    # Saving and tracking
    save_dir: str = "checkpoint"
    """Parent of the run folders."""
    run_name: str | None = None
    """Run folder below save_dir (unset: MODEL/OPTIMIZER-SCHEDULER-sSEED)."""
    save_every: str = "1epoch"
    """How often a resumable checkpoint is written: 1epoch, 500steps, 10m (minutes), or none."""
    keep_checkpoints: int = 2
    """Resumable checkpoints kept; older ones are removed once a new one is safe."""
    save_epochs: int = -1
    """Keep the weights of every so many epochs as model-epoch-XXXX (-1: of the last only)."""
    resume: str = "auto"
    """auto (go on with the run in its folder), never (a fresh folder), or a run or checkpoint folder to go on from."""
    tracker: Literal["wandb", "none"] = "wandb"
    """Experiment tracker beside metrics.jsonl; wandb works offline by itself without a key or a network."""
    project: str = "cifar_accel"
    """wandb project."""
    group: str | None = None
    """wandb group (a study's name)."""
    recipe: str = "report"
    """Set of defaults: report, plain or digits; every flag overrides it."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Evaluate the weights of a run folder on its test set, or on another."""

    run: Positional[str]
    """A run folder (with config.json and model/)."""
    dataset: str | None = None
    """Another data set than the run's, or the place where it lies now."""
    data_dir: str | None = None
    """Where downloads and decoded arrays are kept (unset: as in the run)."""
    batch_size: int = 256
    """Images at once on one device."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, else mps, else cpu."""
    tracker: Literal["wandb", "none"] = "none"
    """Also log the figures to wandb, as a run of job type evaluate in the run's group."""


@dataclass(frozen=True)
class StudyArguments:
    """Run every run of a study file that is not finished. Options after -- go to every run."""

    file: Positional[str]
    """A YAML file in wandb's sweep format (method: grid), or with a list `runs` of option sets."""
    save_dir: str | None = None
    """Parent of the run folders (unset: as the file says)."""


@dataclass(frozen=True)
class ReportArguments:
    """Write report.md and report.html with the tables and plots of all runs below a folder, and print the tables."""

    folder: Positional[str]
    """A folder with run folders at any depth below it."""


# Options that do nothing by themselves: what each needs, and whether it is there. Given in vain, it is an error.
NEEDS: dict[str, tuple[str, Callable[[TrainingArguments], bool]]] = {
    "amsgrad": ("--optimizer adamw", lambda a: a.optimizer == "adamw"),
    "color_jitter": ("--aa none (timm leaves it out beside a policy)", lambda a: a.aa == "none" or "3a" in a.aa),
    "alternating_flip": ("--hflip 0.5 and --pipeline device", lambda a: a.hflip == 0.5 and a.pipeline == "device"),
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

# Options that may differ between a run and its continuation: they change where or how it runs, not what it computes.
VOLATILE = frozenset(
    "data_dir workers micro_batch_size device memory_format max_steps max_time dry_run log_every profile save_dir "
    "run_name save_every keep_checkpoints save_epochs resume tracker project group".split()
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean a, b?` for the names nearest to `name`, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


def flag(field: str) -> str:
    """`learning_rate` -> `--learning-rate`."""
    return "--" + field.replace("_", "-")


def home(path: str) -> Path:
    """`path` with `~` and `~user` filled in. Raises ValueError where there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise ValueError(f"{path}: {e}") from e


def recipe_defaults(name: str) -> TrainingArguments:
    """The defaults under recipe `name`. Raises ValueError when there is none of that name."""
    if name not in RECIPES:
        raise ValueError(f"--recipe {name}: unknown; there are {', '.join(RECIPES)}{did_you_mean(name, RECIPES)}")
    return TrainingArguments(recipe=name, **RECIPES[name])


def resolve(args: TrainingArguments, given: set[str]) -> tuple[TrainingArguments, dict[str, str]]:
    """Fill in what follows from other options and check the whole.

    Args:
        args: the options as parsed, with the recipe's defaults underneath.
        given: the fields that the user set by a flag.

    Returns:
        The resolved options and, by field, where each value comes from: default, recipe, flag or derived.

    Raises:
        ValueError: an option is out of range, or two contradict each other; the message names the flags.
    """
    recipe = RECIPES[args.recipe]
    origin = {f.name: "flag" if f.name in given else "recipe" if f.name in recipe else "default" for f in fields(args)}

    def derive(**values: Any) -> None:
        nonlocal args
        args = replace(args, **values)
        origin.update(dict.fromkeys(values, "derived"))

    check_ranges(args)
    # A path means the same from wherever the run is continued or evaluated.
    if os.path.isdir(home(args.dataset)):
        args = replace(args, dataset=os.path.abspath(home(args.dataset)))
    if args.model.startswith("local-dir:"):
        args = replace(args, model="local-dir:" + os.path.abspath(home(args.model.removeprefix("local-dir:"))))
    if args.checkpoint:
        args = replace(args, checkpoint=os.path.abspath(home(args.checkpoint)))
    if args.resume not in ("auto", "never"):
        args = replace(args, resume=os.path.abspath(home(args.resume)))
    if args.warmup_epochs is None:
        share = {"linear_decay": 0.0, "constant": 0.0, "one_cycle": 0.3}.get(args.scheduler, 0.2)
        derive(warmup_epochs=round(args.epochs * share, 4))
    elif args.warmup_epochs > args.epochs:
        raise ValueError(f"--warmup-epochs {args.warmup_epochs:g}: longer than the run (--epochs {args.epochs})")
    if args.crop_padding and args.scale:
        if {"crop_padding", "scale"} <= given:
            raise ValueError("--crop-padding and --scale are two kinds of random crop: give one of them")
        derive(**({"scale": None} if "crop_padding" in given else {"crop_padding": 0}))
    if args.checkpoint and args.pretrained and not args.model.startswith("local-dir:"):
        if "pretrained" in given:
            raise ValueError("--pretrained and --checkpoint both name weights to start from: give one of them")
        derive(pretrained=False)
    if args.aa != "none":
        derive(**check_policy(args, given))
    for name, (needed, has_effect) in NEEDS.items():
        if not has_effect(args):
            if name in given:
                raise ValueError(f"{flag(name)} has no effect without {needed}")
            if getattr(args, name) != getattr(TrainingArguments, name):  # the recipe set it for another choice
                derive(**{name: getattr(TrainingArguments, name)})
    if args.run_name is None:
        slug = os.path.basename(args.model.removeprefix("local-dir:").rstrip("/")) or "model"
        derive(run_name=f"{slug}/{args.optimizer}-{args.scheduler}-s{args.seed}")
    return args, origin


def check_policy(args: TrainingArguments, given: set[str]) -> dict[str, Any]:
    """Read --aa; returns {"pipeline": "timm"} for a policy that only timm has, unless the user chose a pipeline.

    Raises ValueError for a policy that cannot be read, or that the chosen pipeline lacks.
    """
    from cifar_accel.data.policy import parse

    kind = args.aa.split("-")[0]
    if kind not in ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a"):
        raise ValueError(f"--aa {args.aa}: unknown; timm has rand-..., augmix-..., original, originalr, v0, v0r and 3a")
    if kind == "rand" and parse(args.aa).choice in ("", "weights"):
        return {}
    if args.pipeline == "device" and "pipeline" in given:
        raise ValueError(
            f"--aa {args.aa} needs --pipeline timm (the device pipeline has rand-... without t3a and t3aw)"
        )
    return {"pipeline": "timm"} if args.pipeline == "device" else {}


def check_ranges(args: TrainingArguments) -> None:
    """Raise ValueError for the first option outside its range; the message is one line that names the flag."""
    positive = "epochs batch_size micro_batch_size learning_rate image_size log_every keep_checkpoints crop_pct"
    not_negative = (
        "warmup_epochs workers limit_train limit_test max_steps profile seed weight_decay momentum warmup_lr "
        "min_lr clip_grad crop_padding mixup cutmix color_jitter"
    )
    for name in [*positive.split(), *not_negative.split()]:
        value = getattr(args, name)
        largest = 2**63 - 1 if name == "seed" else 10**9 if isinstance(value, int) else sys.float_info.max
        if value is not None and not value <= largest:
            raise ValueError(f"{flag(name)} {str(value)[:20]}: is no number that this can mean")
    for name in positive.split():
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"{flag(name)} {value:g}: must be greater than 0")
    for name in not_negative.split():
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise ValueError(f"{flag(name)} {value:g}: must be 0 or greater")
    for name in ["hflip", "vflip", "reprob", "mixup_prob", "smoothing", "model_ema_decay", "crop_pct"]:
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"{flag(name)} {getattr(args, name):g}: must lie between 0 and 1")
    if not 0 <= args.validation_fraction < 1:
        raise ValueError(f"--validation-fraction {args.validation_fraction:g}: must be at least 0 and below 1")
    if args.smoothing == 1:
        raise ValueError("--smoothing 1: must be below 1")
    if args.save_epochs == 0 or args.save_epochs < -1:
        raise ValueError(f"--save-epochs {args.save_epochs}: must be -1 (the last epoch only) or greater than 0")
    for name, low, high in (("scale", 0.0, 1.0), ("ratio", 0.0, float("inf"))):
        pair, bound = getattr(args, name), " and at most 1" if high == 1 else ""
        if (pair and not low < pair[0] <= pair[1] <= high) or (pair and pair[1] == float("inf")):
            raise ValueError(f"{flag(name)} {pair[0]:g} {pair[1]:g}: must be an increasing pair above 0{bound}")
    if args.std and not all(0 < value < float("inf") for value in args.std):
        raise ValueError(f"--std {args.std}: every deviation must be greater than 0")
    if args.mean and not all(map(math.isfinite, args.mean)):
        raise ValueError(f"--mean {args.mean}: every mean must be finite")
    parse_interval(args.save_every)
    parse_duration(args.max_time or "1s")
    parse_keywords(args.model_kwargs)
    run = args.run_name
    if run is not None and max(map(len, os.fsencode(run).split(b"/"))) > 250:
        raise ValueError(f"--run-name {run[:40]}...: File name too long")
    if run is not None and (os.path.isabs(run) or ".." in run.split("/") or os.path.normpath(run) == "."):
        raise ValueError(f"--run-name {run}: must be a relative path without '..' (it lies below --save-dir)")


def parse_interval(text: str) -> tuple[int, str]:
    """`1epoch`, `500steps`, `10m` or `none` -> (count, "epoch" | "step" | "minute" | "never"). Raises ValueError."""
    if text == "none":
        return 0, "never"
    for unit, endings in (("epoch", ("epochs", "epoch")), ("step", ("steps", "step")), ("minute", ("m", "min"))):
        for ending in endings:
            count = text.removesuffix(ending)
            if count != text and count.isdecimal() and int(count) > 0:
                return int(count), unit
    raise ValueError(f"--save-every {text}: write a number and a unit, as in 1epoch, 500steps or 10m, or none")


def parse_duration(text: str) -> float:
    """`90m`, `2h`, `1h30m` or `45s` -> seconds. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    seconds = sum(int(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    if not 0 < seconds < 1e9:
        raise ValueError(f"--max-time {text}: write hours, minutes or seconds, as in 2h, 1h30m or 90m")
    return float(seconds)


def parse_keywords(pairs: Iterable[str]) -> dict[str, Any]:
    """`("patch_size=4", "act_layer=gelu")` -> keyword arguments; values read as Python literals, else as text."""
    import ast

    keywords: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--model-kwargs {pair}: must be name=value")
        try:
            keywords[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            keywords[name] = value
    return keywords
