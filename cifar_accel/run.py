"""What a run is made of, and how options become one: processes, data, model, optimizer, resume.

Read it from `set_up` downwards.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.utils import ModelEmaV3

from cifar_accel.data.batches import Pipeline
from cifar_accel.data.datasets import Dataset, Split, find_source, hold_out, is_hub_id, limit
from cifar_accel.data.decode import load_dataset
from cifar_accel.data.order import Order
from cifar_accel.errors import BadInput
from cifar_accel.files import alike, home
from cifar_accel.machine.signals import StopRequest
from cifar_accel.machine.speed import compile_model, keep_freed_memory, peak_flops
from cifar_accel.models.create import (
    build_model,
    check_model,
    forward_flops,
    name_of,
    use_channels_last,
)
from cifar_accel.models.weights import input_statistics
from cifar_accel.optim.gradients import FiniteGuard
from cifar_accel.optim.optimizers import build_optimizer, check_names
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.policy import read_policy, strength
from cifar_accel.records import checkpoint
from cifar_accel.records.folder import Opened
from cifar_accel.records.summary import describe_config


@dataclass
class State:
    """All of a run that changes, besides weights and optimizer; this is what a checkpoint's state.json holds."""

    step: int = 0  # finished optimizer steps
    due: bool = False  # a stop came before the row of this step: its evaluation is still to do
    time_s: float = 0.0  # spent training; stands still during evaluation and saving
    wall_s: float = 0.0  # spent altogether, over all starts
    # loss sum, correct, images, seconds, seconds of them waiting for input
    window: list[float] = field(default_factory=lambda: [0.0] * 5)
    epoch: list[float] = field(
        default_factory=lambda: [0.0, 0.0, 0.0]
    )  # loss sum, correct, images since the epoch began
    gradient_norm: float = 0.0  # of the last step, before clipping
    train_loss: float | None = None  # mean over the last whole epoch
    evaluation: dict[str, float] = field(default_factory=dict)  # the last one
    evaluated_step: int = -1  # and after which step that was
    best_accuracy: float = 0.0
    tracker_id: str | None = None
    scaler: dict[str, Any] | None = None  # fp16 loss scale
    data: str = ""  # fingerprint of the data set


@dataclass
class Run:
    """Everything that is set up once and does not change."""

    args: TrainingArguments
    say: Callable[[str], None]
    accelerator: Accelerator
    path: Path
    module: torch.nn.Module  # the bare model; what evaluation and saving use
    model: torch.nn.Module  # the same, wrapped for training
    ema: ModelEmaV3 | None
    optimizer: Any
    guard: FiniteGuard
    order: Order
    train: Pipeline
    evaluation: Pipeline  # the held-out images, or the test split
    test: Pipeline
    total_steps: int
    stop_step: int
    stop: StopRequest
    began_in: Path | None  # the run folder of the checkpoint from which this start goes on
    memory_format: torch.memory_format
    flops: int  # of one image's forward and backward pass, taken as three times the forward pass
    peak_flops: float | None  # of this device at this precision, in FLOP/s, where it is known
    compiled: bool
    host_group: Any  # gloo group of all ranks for what the hosts agree on; None with one process
    config: dict[str, Any] = field(default_factory=dict)  # what config.json holds
    evaluating: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def result(self) -> torch.nn.Module:
        """The weights that are evaluated and saved: the average if one is kept."""
        return self.ema.module if self.ema else self.module


def set_up(
    args: TrainingArguments,
    origin: dict[str, str],
    say: Callable[[str], None],
    opened: Opened,
    accelerator: Accelerator,
    stop: StopRequest,
) -> tuple[Run, State]:
    """Load the data, make the model and the optimizer, and resume. All ranks enter. Raises BadInput for bad input."""
    check_choices(args, say)
    start_from = choose_checkpoint(opened, accelerator, say)
    # What a checkpoint holds need not be had a second time.
    start = replace(args, pretrained=False, checkpoint=None) if start_from else args
    check_model(start, say)
    data, held_out = load_splits(args, say)
    order = make_order(args, len(data.train), accelerator)
    total_steps = args.epochs * order.steps_per_epoch
    stop_step = min(args.max_steps or total_steps, total_steps)
    say(f"model: making {name_of(args)}")
    module, ema, memory_format, flops = make_model(
        args, start, len(data.train.classes), accelerator.device, say
    )
    compiled = args.compile and compile_model(module, args.compile_mode, accelerator.device, say)
    if compiled and ema:
        compile_model(ema.module, args.compile_mode, accelerator.device, say)
    # DDP need not look for unused parameters in every step, nor send buffers: evaluation takes the main process's.
    accelerator.ddp_handler.static_graph = order.accumulation == 1
    accelerator.ddp_handler.broadcast_buffers = False
    model, optimizer = accelerator.prepare(module, build_optimizer(module, args))
    state = State(data=data.fingerprint)
    if start_from:
        state = restore(
            start_from, opened, accelerator, module, optimizer, ema, data.fingerprint, total_steps
        )
        say(f"resume: from {start_from}, after step {state.step:,}")
    mean, std = input_statistics(args, module)
    train, test = (
        Pipeline(args, split, accelerator.device, mean, std) for split in (data.train, data.test)
    )
    run = Run(
        args=args,
        say=say,
        accelerator=accelerator,
        path=opened.path,
        module=module,
        model=model,
        ema=ema,
        optimizer=optimizer,
        guard=FiniteGuard(
            optimizer.optimizer, accelerator.device, accelerator.scaler is not None, state.step
        ),
        order=order,
        train=train,
        evaluation=test
        if held_out is data.test
        else Pipeline(args, held_out, accelerator.device, mean, std),
        test=test,
        total_steps=total_steps,
        stop_step=stop_step,
        stop=stop,
        began_in=start_from and start_from.parent.parent,
        memory_format=memory_format,
        flops=3 * flops,
        peak_flops=peak_flops(accelerator.device, accelerator.mixed_precision),
        compiled=compiled,
        host_group=torch.distributed.new_group(backend="gloo")
        if accelerator.num_processes > 1
        else None,
    )
    run.config = describe(run, origin, data.fingerprint)
    announce(run, origin)
    return run, state


def check_choices(args: TrainingArguments, say: Callable[[str], None]) -> None:
    """Raise BadInput for an optimizer, schedule or data set that does not exist, before anything is downloaded."""
    check_names(args)
    if not is_hub_id(args.dataset):
        try:
            find_source(args.dataset, home(args.data_dir), say)
        except OSError as e:
            raise BadInput(f"--dataset {args.dataset[:200]}: {e.strerror or e}") from e


def make_model(
    args: TrainingArguments,
    start: TrainingArguments,
    classes: int,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Any, ModelEmaV3 | None, torch.memory_format, int]:
    """The model on the device with the weights that `start` names, its average, its layout, and its forward FLOPs."""
    if device.type == "cpu":
        keep_freed_memory()
    module: Any = build_model(start, classes, say)
    flops = forward_flops(module, args.image_size)
    channels_last = use_channels_last(args, module, device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    module.to(device, memory_format=memory_format)
    # With timm's warm-up of the decay: short runs would else average in their first weights.
    ema = ModelEmaV3(module, args.model_ema_decay, use_warmup=True) if args.model_ema else None
    return module, ema, memory_format, flops


def describe(run: Run, origin: dict[str, str], fingerprint: str) -> dict[str, Any]:
    """What config.json holds: the options and what follows from them on this machine."""
    order, train = run.order, run.train
    return describe_config(
        run.args,
        origin,
        {
            "mixed_precision": run.accelerator.mixed_precision,
            "processes": order.world,
            "device_batch_size": order.micro_batch_size,
            "accumulation_steps": order.accumulation,
            "steps_per_epoch": order.steps_per_epoch,
            "total_steps": run.total_steps,
            "stop_step": run.stop_step,
            "device_name": str(run.accelerator.device).replace("cpu:0", "cpu"),
            "memory_format": "channels_last"
            if run.memory_format is torch.channels_last
            else "contiguous",
            "forward_gflops": run.flops / 3e9,
            "train_images": len(train.split),
            "held_out_images": len(run.evaluation.split),
            "test_images": len(run.test.split),
            "classes": len(train.split.classes),
            "data_fingerprint": fingerprint,
            "input_mean": train.mean,
            "input_std": train.std,
            "parameters": sum(p.numel() for p in run.module.parameters()),
        },
    )


def load_splits(args: TrainingArguments, say: Callable[[str], None]) -> tuple[Dataset, Split]:
    """The data set, cut as the options say, and the split that is evaluated while training."""
    local_main = os.environ.get("LOCAL_RANK", "0") == "0"
    data = load_dataset(
        args.dataset, args.data_dir, args.image_size, say if local_main else lambda line: None
    )
    return cut_splits(args, data, min(data.train.images.shape[2:]))


def cut_splits(args: TrainingArguments, data: Dataset, side: int) -> tuple[Dataset, Split]:
    """`data`, of images with a shorter side of `side` pixels, cut as the options say, and the split evaluated.

    Raises BadInput when it cannot be cut so.
    """
    train_split = limit(data.train, args.limit_train, "--limit-train", args.seed)
    test = limit(data.test, args.limit_test, "--limit-test", args.seed)
    held_out = test
    if args.validation_fraction:
        train_split, held_out = hold_out(train_split, args.validation_fraction, args.seed)
    if args.crop_padding >= side:
        raise BadInput(
            f"--crop-padding {args.crop_padding}: must be smaller than the images' side of {side} pixels"
        )
    return replace(data, train=train_split, test=test), held_out


def make_order(args: TrainingArguments, samples: int, accelerator: Accelerator) -> Order:
    """The plan of the run for this process. Raises BadInput when the batch cannot be cut equally."""
    accumulation = accelerator.gradient_accumulation_steps  # what `accelerate launch` was told
    accelerator.gradient_accumulation_steps = 1  # the loop divides the loss itself
    return cut_batch(
        args, samples, accelerator.num_processes, accelerator.process_index, accumulation
    )


def cut_batch(
    args: TrainingArguments, samples: int, world: int, rank: int, accumulation: int
) -> Order:
    """Cut the global batch over `world` processes and the launcher's `accumulation`, or what the options say.

    Raises BadInput when it cannot be cut equally.
    """
    if accumulation < 1:
        raise BadInput(
            f"the launcher's gradient_accumulation_steps {accumulation}: must be 1 or greater"
        )
    size, rest = divmod(args.batch_size, world)
    if rest or not size:
        near = f"{size * world} or {(size + 1) * world}" if size else str(world)
        raise BadInput(
            f"--batch-size {args.batch_size}: cannot be divided by {world} processes; {near} can"
        )
    if accumulation > 1 and args.micro_batch_size:
        raise BadInput(
            f"--micro-batch-size and the launcher's gradient_accumulation_steps {accumulation} are both given"
        )
    if args.micro_batch_size:
        accumulation = next(
            a for a in range(1, size + 1) if size % a == 0 and size // a <= args.micro_batch_size
        )
    if size % accumulation:
        raise BadInput(
            f"--batch-size {args.batch_size}: {size} images a process cannot be divided by the launcher's "
            f"gradient_accumulation_steps {accumulation}"
        )
    if samples < args.batch_size:
        raise BadInput(
            f"--batch-size {args.batch_size}: larger than the training set ({samples:,} images): an epoch has no step"
        )
    return Order(args.seed, samples, args.batch_size, world, rank, accumulation)


def evaluation_batch_size(args: TrainingArguments, order: Order) -> int:
    """Images evaluated at once on one device: a limit that the user set holds here too."""
    return args.micro_batch_size or max(256, order.micro_batch_size)


def warmup_steps(args: TrainingArguments, order: Order) -> int:
    """Optimizer steps of warm-up."""
    return round((args.warmup_epochs or 0) * order.steps_per_epoch)


def choose_checkpoint(
    opened: Opened, accelerator: Accelerator, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint to go on from, or None. All ranks enter; rank 0 chooses. Raises BadInput for a damaged one."""
    chosen = (
        checkpoint.choose([opened.resume_from, opened.fallback], say)
        if accelerator.is_main_process
        else None
    )
    name = broadcast_object_list([chosen and str(chosen)])[0]
    return Path(name) if name else None


def restore(
    path: Path,
    opened: Opened,
    accelerator: Accelerator,
    module: torch.nn.Module,
    optimizer: Any,
    ema: ModelEmaV3 | None,
    fingerprint: str,
    total_steps: int,
) -> State:
    """Load checkpoint folder `path` and return the state it holds. All ranks enter.

    Raises BadInput when it was written on other images, by another model or a longer run, or not by this trainer.
    """
    try:
        state = State(**checkpoint.read_state(path))
        state.window += [0.0] * (5 - len(state.window))  # earlier versions did not time the input
        sound = state.step >= 0 and all(
            alike(getattr(state, name), value) for name, value in vars(State()).items()
        )
    except (ValueError, TypeError):
        sound = False
    if not sound:
        raise BadInput(
            f"--resume {path}: its state.json is none that this trainer writes; {checkpoint.REMEDY}"
        )
    if state.step > total_steps:
        raise BadInput(f"--resume {path}: stands at step {state.step:,} of {total_steps:,}")
    if state.data != fingerprint:
        raise BadInput(f"--resume {path}: was trained on other images than --dataset now holds")
    checkpoint.load_checkpoint(path, module, optimizer.optimizer, ema.module if ema else None)
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    if (
        path.parent.parent.resolve() != opened.path.resolve()
    ):  # a new run that begins where another stood
        state.tracker_id = None
    return state


def announce(run: Run, origin: dict[str, str]) -> None:
    """Print every derived value once, with its reason."""
    args, order, config = run.args, run.order, run.config["options"]
    precision = {"no": "fp32"}.get(config["mixed_precision"], config["mixed_precision"])
    reason = "from the launcher" if "ACCELERATE_MIXED_PRECISION" in os.environ else "the default"
    warmup = warmup_steps(args, order)
    how = " (derived)" if origin["warmup_epochs"] == "derived" else ""
    workers = f", {args.workers} workers" if args.pipeline == "timm" else ""
    lines = {
        "run": str(run.path),
        "device": f"{config['device_name']}, precision {precision} ({reason})",
        "data": f"{args.dataset}: {config['train_images']:,} training, {config['test_images']:,} test images, "
        f"{config['classes']} classes; {args.pipeline} pipeline{workers}",
        "policy": f"{args.aa}{strength(read_policy(args.aa)) if args.aa.startswith('rand') else ''}",
        "batch": order.arithmetic(),
        "steps": f"{args.epochs} epoch{'s' * (args.epochs > 1)} x {order.steps_per_epoch:,} = {run.total_steps:,}"
        + (f", stopping after {run.stop_step:,}" if run.stop_step < run.total_steps else ""),
        "schedule": f"{args.scheduler}, peak {args.learning_rate:g}, "
        f"warm-up {args.warmup_epochs:g} epochs{how} = {warmup:,} steps",
        "model": f"{name_of(args)}, {config['parameters'] / 1e6:.2f} M parameters; {args.optimizer}"
        + (", averaged weights evaluated and saved" if args.model_ema else ""),
    }
    if args.aa == "none":
        del lines["policy"]
    for name, text in lines.items():
        run.say(f"{name:<9} {text}")
