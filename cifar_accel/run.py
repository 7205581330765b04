"""What a run is made of, and how options become one: data, plan, model, optimizer, resume.

Read it from `set_up` downwards. What a checkpoint holds beside weights and optimizer is the run's
`State` (records/state.py).
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

from cifar_accel.budget import LAST_SIZES
from cifar_accel.console import say
from cifar_accel.data.batches import Pipeline
from cifar_accel.data.datasets import Dataset, Split
from cifar_accel.data.decode import load_images, size_to_store, system_failures_named
from cifar_accel.data.sources import find_source, is_hub_id
from cifar_accel.data.splits import Splits, cut_splits
from cifar_accel.errors import BadInput
from cifar_accel.files import home
from cifar_accel.machine.memory import in_bytes
from cifar_accel.machine.processes import Ranks
from cifar_accel.machine.signals import StopRequest
from cifar_accel.machine.speed import compile_model, keep_freed_memory, peak_flops
from cifar_accel.models.advice import advice
from cifar_accel.models.create import (
    build_model,
    check_model,
    forward_flops,
    name_of,
    use_channels_last,
)
from cifar_accel.models.finetune import fit_to_model
from cifar_accel.models.weights import input_statistics
from cifar_accel.optim.gradients import Watch
from cifar_accel.optim.optimizers import build_optimizer, check_names
from cifar_accel.options.options import TrainingArguments, flag, in_words
from cifar_accel.options.policy import read_policy, strength
from cifar_accel.options.recipes import DERIVED_LATE, PLANNED
from cifar_accel.options.resolve import with_derived
from cifar_accel.plan import Plan, make_plan
from cifar_accel.records import checkpoint
from cifar_accel.records.folder import Opened, check_images
from cifar_accel.records.meters import Sums
from cifar_accel.records.state import State
from cifar_accel.records.summary import describe_config


@dataclass(frozen=True)
class Folder:
    """Where a run writes, and what its config.json says."""

    path: Path
    # The run folder of the checkpoint that this start goes on from.
    began_in: Path | None
    config: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """The model in its forms. Called on images it is the training forward pass."""

    # The bare model, and the same wrapped for training on several processes.
    module: torch.nn.Module
    wrapped: torch.nn.Module
    average: ModelEmaV3 | None
    layout: torch.memory_format
    compiled: bool
    # Of one image's forward and backward pass, taken as three times the forward pass, by its size.
    flops: dict[int, int]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [m, classes] of images [m, 3, S, S]."""
        if self.compiled:
            # A CUDA graph may then overwrite what its last replay returned.
            torch.compiler.cudagraph_mark_step_begin()
        logits: torch.Tensor = self.wrapped(images.contiguous(memory_format=self.layout))
        return logits

    @property
    def evaluated(self) -> torch.nn.Module:
        """The weights that are evaluated and saved: the average where one is kept."""
        return self.average.module if self.average else self.module


@dataclass(frozen=True)
class Data:
    """The splits; `evaluation` is evaluated while training: held-out images or the test split."""

    train: Pipeline
    evaluation: Pipeline
    # The same object as `evaluation` where that is what counts in the end.
    test: Pipeline

    @property
    def evaluated_on(self) -> str:
        """What the images that are evaluated while training are: "test" or "held-out"."""
        return "held-out" if self.train.args.validation_fraction else "test"

    @property
    def tested_on(self) -> str:
        """What the images are that count in the end: held-out ones where there is no test split."""
        return self.evaluated_on if self.test is self.evaluation else "test"


@dataclass(frozen=True)
class Run:
    """The parts of a run. What they hold changes; none of them is ever replaced."""

    args: TrainingArguments
    folder: Folder
    plan: Plan
    ranks: Ranks
    data: Data
    model: Model
    criterion: torch.nn.Module
    # Accelerate's wrapper; `optimizer.optimizer` is the bare one.
    optimizer: Any
    sums: Sums
    watch: Watch
    stop: StopRequest
    # What the model says, at the last step, of the images of "test" and "held-out" splits: of each
    # what `Outputs.of_all_ranks` gives.
    outputs: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def set_up(
    args: TrainingArguments,
    origin: dict[str, str],
    opened: Opened,
    ranks: Ranks,
    stop: StopRequest,
    splits: Splits | None = None,
) -> tuple[Run, State]:
    """Load the data, make the model and the optimizer, and resume. All ranks enter.

    `splits` are in place of what --dataset names. Raises BadInput.
    """
    # Refuse what does not exist before anything is downloaded or decoded.
    if splits is None:
        check_choices(args)
    chosen = checkpoint.choose(opened, say) if ranks.is_main else None
    start_from: Path | None = ranks.from_main(chosen)
    # Resuming: the weights come from the checkpoint, so do not download the pretrained ones.
    without: dict[str, Any] = {"pretrained": False, "checkpoint": None} if start_from else {}
    check_model(replace(args, **without), say)
    args, origin = fit_options(args, origin, opened)
    making = replace(args, **without)

    # The data comes first: the plan needs the number of images, the model that of the classes.
    dataset, held_out = splits or load_splits(args)
    check_images(opened, dataset.name, dataset.fingerprint)
    args, origin = fit_to_images(args, origin, opened, dataset)
    plan = make_plan(args, len(dataset.train), ranks.world, ranks.rank, ranks.accumulation)

    # The model tells how its input is normalised.
    model, optimizer = make_model(args, making, len(dataset.train.classes), plan, ranks)
    data = make_data(args, dataset, held_out, model.module, ranks.device)

    # Where it stands: at the beginning, or where a checkpoint does.
    state = State(data=dataset.fingerprint)
    if start_from:
        state = restore(start_from, opened, dataset.fingerprint, plan, ranks, model, optimizer)
        say(f"resume: from {start_from}, after step {state.step:,}")

    # Record and announce what the options come to here.
    facts = facts_of(args, plan, ranks, data, model) | {"data_fingerprint": dataset.fingerprint}
    config = describe_config(args, origin, facts)
    notes = advice(args, origin, model.module)
    announce(args, origin, opened.path, plan, config["options"], notes)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    run = Run(
        args=args,
        folder=Folder(opened.path, start_from.parent.parent if start_from else None, config),
        plan=plan,
        ranks=ranks,
        data=data,
        model=model,
        # Targets carry any smoothing and mixing.
        criterion=BinaryCrossEntropy() if args.bce_loss else SoftTargetCrossEntropy(),
        optimizer=optimizer,
        sums=Sums(ranks.device, ranks.world),
        watch=Watch(parameters, ranks.device, bool(ranks.accelerator.scaler), state.step),
        stop=stop,
    )
    return run, state


# ---- options that follow from the model


def fit_options(
    args: TrainingArguments, origin: dict[str, str], opened: Opened
) -> tuple[TrainingArguments, dict[str, str]]:
    """The options as they hold for the model, or held at the first start of a run that goes on."""
    if opened.derived or opened.config:
        return with_derived(args, origin, opened.derived)
    # --budget has fitted them before it chose sizes or epochs.
    if "derived" in (origin["image_size"], origin["epochs"]):
        return args, origin
    if args.recipe == "finetune":
        say(f"recipe: fitting finetune to {name_of(args)}")
        args, origin = fit_to_model(args, origin)
    grows_to = LAST_SIZES[-1] if args.budget and origin["image_size"] != "flag" else 0
    return with_derived(args, origin, {"stored_size": size_to_store(args, grows_to)})


def fit_to_images(
    args: TrainingArguments, origin: dict[str, str], opened: Opened, dataset: Dataset
) -> tuple[TrainingArguments, dict[str, str]]:
    """The options with what finetune makes of the images' size and number."""
    if args.recipe != "finetune" or opened.derived or opened.config:
        return args, origin
    # Crops are shifted by the same share of any image; the recipe has the pixels for 32.
    side = min(dataset.train.images.shape[2:])
    values: dict[str, Any] = {"crop_padding": round(args.crop_padding * side / 32)}
    # Weights are averaged over about the last tenth of the run.
    if args.model_ema:
        steps = args.epochs * max(1, len(dataset.train) // args.batch_size)
        values["model_ema_decay"] = min(max(0.9, 1 - 10 / steps), 0.9998)
    return with_derived(args, origin, values)


# ---- what does not exist


def check_choices(args: TrainingArguments) -> None:
    """Raise BadInput for an optimizer, schedule or data set that does not exist."""
    check_names(args)
    # Whether a hub has it is known only by asking the hub.
    if is_hub_id(args.dataset):
        return
    with system_failures_named(f"--dataset {args.dataset[:200]}"):
        find_source(args.dataset, home(args.data_dir), lambda line: None)


# ---- data


def load_splits(args: TrainingArguments) -> Splits:
    """The data set, cut as the options say, and the split that is evaluated while training."""
    dataset = load_images(args, say)
    return cut_splits(args, dataset, min(dataset.train.images.shape[2:]))


def make_data(
    args: TrainingArguments,
    dataset: Dataset,
    held_out: Split,
    module: torch.nn.Module,
    device: torch.device,
) -> Data:
    """The splits' pipelines, normalised as the options or the model ask for.

    Raises BadInput when the device has no room for the images.
    """
    mean, std = input_statistics(args, module)

    def pipeline(split: Split) -> Pipeline:
        try:
            return Pipeline(args, split, device, mean, std)
        except torch.OutOfMemoryError as e:
            size = in_bytes(split.images.nbytes)
            raise BadInput(
                f"--dataset {dataset.name}: no room on {device} for {size} of images; "
                "--pipeline timm keeps them on the host"
            ) from e

    test = pipeline(dataset.test)
    evaluation = test if held_out is dataset.test else pipeline(held_out)
    return Data(pipeline(dataset.train), evaluation, test)


# ---- model and optimizer


def make_model(
    args: TrainingArguments, making: TrainingArguments, classes: int, plan: Plan, ranks: Ranks
) -> tuple[Model, Any]:
    """The model on the device, and its optimizer. All ranks enter.

    `making` are the options that the model is made by: `args`, but without weights to start from
    where a checkpoint has them.
    """
    device = ranks.device
    if device.type == "cpu":
        keep_freed_memory()
    # Made on the CPU in float32, so that its initial weights are the same on every device.
    say(f"model: making {name_of(args)}")
    module: Any = build_model(making, classes, say)
    flops = {size: 3 * forward_flops(module, size) for size, _ in args.sizes}
    # Images and weights share one layout, whichever is faster for the family and device.
    channels_last = use_channels_last(args, module, device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module.to(device, memory_format=layout)

    average = None
    if args.model_ema:
        # With timm's warm-up of the decay: short runs would else average in their first weights.
        average = ModelEmaV3(module, args.model_ema_decay, use_warmup=True)
    # Compiled in place and before it is wrapped, so that checkpoints keep the names of weights.
    compiled = args.compile and compile_model(module, args.compile_mode, device, say)
    if compiled and average:
        compile_model(average.module, args.compile_mode, device, say)

    # DDP need not look for unused parameters in every step, nor send buffers: evaluation takes the
    # main process's.
    ddp = ranks.accelerator.ddp_handler
    ddp.static_graph = plan.accumulation == 1
    ddp.broadcast_buffers = False
    wrapped, optimizer = ranks.accelerator.prepare(module, build_optimizer(module, args))
    return Model(module, wrapped, average, layout, compiled, flops), optimizer


# ---- resume


def restore(
    path: Path,
    opened: Opened,
    fingerprint: str,
    plan: Plan,
    ranks: Ranks,
    model: Model,
    optimizer: Any,
) -> State:
    """Load checkpoint folder `path` and return the state it holds. All ranks enter.

    Raises BadInput when it was written on other images, by another model or a longer run, or not by
    this trainer.
    """
    # It must be a checkpoint of this very run.
    state = checkpoint.read_state(path)
    if state.step > plan.total_steps:
        raise BadInput(f"--resume {path}: stands at step {state.step:,} of {plan.total_steps:,}")
    if state.data != fingerprint:
        raise BadInput(f"--resume {path}: was trained on other images than --dataset now holds")
    # Weights, optimizer, average and loss scale, all in place.
    average = model.average.module if model.average else None
    checkpoint.load_checkpoint(path, model.module, optimizer.optimizer, average)
    scaler = ranks.accelerator.scaler
    if scaler is not None and state.scaler:
        scaler.load_state_dict(state.scaler)
    if path.parent.parent.resolve() != opened.path.resolve():
        # A new run that begins where another stood is a new run of the tracker too.
        state.tracker_id = None
    return state


# ---- what is said and recorded of a run


def facts_of(
    args: TrainingArguments, plan: Plan, ranks: Ranks, data: Data, model: Model
) -> dict[str, Any]:
    """What config.json records beside the options: what they come to on this machine."""
    layout = "channels_last" if model.layout is torch.channels_last else "contiguous"
    return {
        "mixed_precision": ranks.accelerator.mixed_precision,
        **plan.facts(),
        "device_name": str(ranks.device).replace("cpu:0", "cpu"),
        "memory_format": layout,
        "forward_gflops": model.flops[args.input_size] / 3e9,
        "train_images": len(data.train.split),
        # What is evaluated while training: the test images where none are held out.
        "held_out_images": len(data.evaluation.split),
        "test_images": len(data.test.split),
        "tested_on": data.tested_on,
        "classes": len(data.train.split.classes),
        "input_mean": data.train.mean,
        "input_std": data.train.std,
        "parameters": sum(p.numel() for p in model.module.parameters()),
    }


def announce(
    args: TrainingArguments,
    origin: dict[str, str],
    folder: Path,
    plan: Plan,
    facts: dict[str, Any],
    notes: list[str],
) -> None:
    """Print every derived value once, with its reason, and the `notes`."""
    # Where it writes, what computes, and on what.
    precision = facts["mixed_precision"].replace("no", "fp32")
    reason = "from the launcher" if "ACCELERATE_MIXED_PRECISION" in os.environ else "the default"
    workers = f", {args.workers} workers" if args.pipeline == "timm" else ""
    average = ", averaged weights evaluated and saved" if args.model_ema else ""
    images = f"{facts['test_images']:,} {facts['tested_on']} images"
    lines = {
        "run": str(folder),
        "device": f"{facts['device_name']}, precision {precision} ({reason})",
        "data": f"{args.dataset}: {facts['train_images']:,} training, {images}, "
        f"{facts['classes']} classes; {args.pipeline} pipeline{workers}",
    }
    if args.recipe == "finetune":
        lines["recipe"] = recipe_line(args, origin)
    # timm lowers a magnitude above its ceiling without a word; say so.
    if args.aa != "none":
        acts_as = strength(read_policy(args.aa)) if args.aa.startswith("rand") else ""
        lines["policy"] = args.aa + acts_as
    lines |= plan.lines(origin)
    lines["model"] = (
        f"{name_of(args)}, {facts['parameters'] / 1e6:.2f} M parameters; {args.optimizer}{average}"
    )
    for name, text in [*lines.items(), *(("note", note) for note in notes)]:
        say(f"{name:<9} {text}")


def recipe_line(args: TrainingArguments, origin: dict[str, str]) -> str:
    """What the recipe chose, and what follows from the model and the images."""
    values = [
        f"{flag(name)} {in_words(getattr(args, name))}"
        for name in sorted(DERIVED_LATE - PLANNED)
        if origin[name] == "derived"
    ]
    size = f"{args.image_size} px, {args.epochs} epoch{'s' * (args.epochs > 1)}"
    return f"{args.recipe}: {size}; derived: {', '.join(values) or 'nothing'}"


def device_peak(run: Run) -> float | None:
    """The device's peak at the run's precision in FLOP/s, or None where it is not known."""
    return peak_flops(run.ranks.device, run.ranks.accelerator.mixed_precision)
