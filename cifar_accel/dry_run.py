"""`--dry-run`: what would be trained, where each value comes from, and what is amiss here.

Writes nothing and starts nothing. Each check is a function that returns a line, raises Note for
what deserves a look, or BadInput for what would refuse or spoil the run; both say what to do. A new
check is one such function and its name in CHECKS.
"""

import math
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from cifar_accel.console import in_time, say
from cifar_accel.data.datasets import Dataset, Split
from cifar_accel.data.decode import MOST_STORED, image_shape
from cifar_accel.data.sources import find_source, hub_marker, is_hub_id
from cifar_accel.data.splits import Splits, cut_splits
from cifar_accel.errors import BadInput
from cifar_accel.files import home
from cifar_accel.launch.command import check_launcher, read_launcher_config
from cifar_accel.machine.environment import ACCUMULATION, mixed_precision, whole_number
from cifar_accel.machine.memory import SCRATCH, Estimate, estimate, free_memory, in_bytes
from cifar_accel.machine.processes import check_device, chosen_device, join_processes
from cifar_accel.machine.signals import StopRequest
from cifar_accel.models.create import build_model, check_model, name_of
from cifar_accel.network import require_network
from cifar_accel.optim.optimizers import build_optimizer, check_names, moments_per_weight
from cifar_accel.options.options import TrainingArguments, flag, in_words
from cifar_accel.options.recipes import PLANNED
from cifar_accel.plan import Plan, make_plan, micro_batch_sizes
from cifar_accel.records import checkpoint
from cifar_accel.records.folder import LOCK, Opened, folder_of, look_inside
from cifar_accel.records.trackers import wandb_mode
from cifar_accel.run import fit_options
from cifar_accel.timing import UNKNOWN, Start, fit_to_budget, time_side, with_pixels
from cifar_accel.trial import how_to_cut

# What torchvision's two sets hold, so that a run can be planned before they are downloaded:
# training images, test images, classes; and the host that they come from.
TORCHVISION_SIZES = {"cifar100": (50_000, 10_000, 100), "cifar10": (50_000, 10_000, 10)}
CIFAR_HOST = "www.cs.toronto.edu"

# Steps of each size are timed so long.
SECONDS_TO_TIME = 1.0


class Note(Exception):
    """Nothing that ends a run, but something that its owner may not know."""


@dataclass
class Findings:
    """What the checks look at, and what earlier checks found for later ones."""

    args: TrainingArguments
    precision: str
    # Of the whole run, and of them on this machine.
    processes: int
    local_processes: int
    training_images: int | None = None
    classes: int | None = None
    # Bytes of all images of all splits as they are stored, and of those that the run has.
    image_bytes: int = 0
    resident_bytes: int = 0
    plan: Plan | None = None
    # Bytes of a float32 copy of the model.
    weight_bytes: int = 0
    # The splits without pixels, the images' sides, and whether a step fits into memory.
    splits: Splits | None = None
    side: tuple[int, int] = (0, 0)
    fits: bool = False
    # Names of the checks that were BAD so far.
    failed: list[str] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)
    # Whether sizes and epochs are known, and not left to --budget.
    is_planned: bool = True


def dry_run(args: TrainingArguments, origin: dict[str, str]) -> int:
    """Print the options and the checks; 2 when a check says that the run would not work, else 0."""
    # launch.sh tells one process that looks how many it would start.
    processes = whole_number("CIFAR_ACCEL_PROCESSES", whole_number("WORLD_SIZE"))
    local = whole_number("LOCAL_WORLD_SIZE", processes)
    precision = mixed_precision()
    # As a start would, with what an earlier one derived. Where that is not possible, a check below
    # says why.
    is_planned = not args.budget
    with suppress(BadInput):
        opened = Opened(folder_of(args), origin=origin)
        with suppress(BadInput):
            look_inside(opened, args, precision, lambda line: None)
        is_planned |= bool(opened.derived.keys() & PLANNED)
        args, origin = fit_options(args, origin, opened)
    found = Findings(args, precision, max(1, processes), max(1, local), origin=origin)
    found.is_planned = is_planned
    print_options(found)

    # Every check is made, whatever the one before it says.
    say("\nplan and health")
    told: set[str] = set()
    for name, check in CHECKS.items():
        mark, text = outcome(check, found)
        if mark == "BAD" and text in told:
            mark, text = "note", "not known: see above"
        told.add(text)
        if mark == "BAD":
            found.failed.append(name)
        say(f"  {mark:<5} {name:<10} {text}")
    if found.failed:
        say(f"\n{len(found.failed)} of {len(CHECKS)} checks failed")
        return 2
    say("\nnothing is in the way; the same command without --dry-run trains")
    return 0


def print_options(found: Findings) -> None:
    """Every option with its value and where that comes from."""
    say("\noptions (flag over recipe over default; precision and processes are the launcher's)")
    args = found.args
    rows = [
        (flag(f.name), in_words(getattr(args, f.name)), found.origin[f.name]) for f in fields(args)
    ]
    from_launcher = "launcher" if "ACCELERATE_MIXED_PRECISION" in os.environ else "default"
    rows.append(("mixed precision", found.precision, from_launcher))
    from_launcher = "launcher" if found.processes > 1 else "default"
    rows.append(("processes", str(found.processes), from_launcher))
    for name, value, source in rows:
        if not found.is_planned and name in map(flag, PLANNED) and source != "flag":
            value, source = "by --budget: see time", "derived"
        say(f"  {name:<22} {value:<28} {source}")


def outcome(check: Callable[[Findings], str], found: Findings) -> tuple[str, str]:
    """The mark (ok, note, BAD) and the line of one check."""
    try:
        return "ok", check(found)
    except Note as e:
        return "note", str(e)
    # RuntimeError is torch's, of a device that is not there.
    except (BadInput, OSError, RuntimeError) as e:
        return "BAD", " ".join(str(e).split())


# ---- the checks, in their order


def check_the_device(found: Findings) -> str:
    """The device is there."""
    check_device(found.args.device, found.precision)
    device = chosen_device(found.args.device)
    if device.type != "cuda":
        return f"{device.type}, {os.cpu_count()} cores"
    # NCCL takes one process a GPU.
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if found.local_processes > len(names):
        raise Note(
            f"{found.local_processes} processes share {len(names)} GPU: {', '.join(names)}, over "
            "gloo: slow, for tests"
        )
    return ", ".join(names)


def check_precision(found: Findings) -> str:
    """The device computes fast at the precision asked for."""
    device = chosen_device(found.args.device)
    emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if found.precision == "bf16" and emulated:
        raise Note("bf16 is emulated on this GPU: launch with --mixed_precision fp16 or no")
    return found.precision.replace("no", "fp32")


def check_the_launcher(found: Findings) -> str:
    """The user's accelerate config starts what it says; several processes find each other."""
    check_launcher()
    file, why, config = read_launcher_config()
    if config.distributed_type == "MULTI_CPU":
        n = config.num_processes
        raise Note(
            f"{file} says MULTI_CPU and {n} processes, but accelerate launch starts ONE with it; "
            f"./launch.sh starts {n}, and so does torchrun --standalone --nproc_per_node {n} "
            "-m cifar_accel"
        )
    return f"./launch.sh would take {file} ({why})"


def check_data(found: Findings) -> str:
    """The images are here, or can be had, and can be cut as the options say."""
    args, name = found.args, found.args.dataset
    root = home(args.data_dir)
    if not os.access(nearest_folder(root), os.W_OK):
        raise BadInput(f"--data-dir {args.data_dir}: {nearest_folder(root)} cannot be written")

    labels, classes, side, note = known_images(args, root)
    found.image_bytes = 3 * math.prod(side) * sum(map(len, labels.values()))

    # Cut them as a start would; for that images without pixels do.
    names = [str(c) for c in range(classes)]
    train, test = (
        Split(np.empty((len(of_split), 0), np.uint8), of_split.astype(np.int64), names)
        for of_split in (labels["train"], labels.get("test", np.arange(0)))
    )
    dataset, held_out = cut_splits(args, Dataset(name, train, test, ""), min(side))
    found.classes = classes
    found.training_images = len(dataset.train)
    found.splits, found.side = (dataset, held_out), side
    kept = len(dataset.train) + len(dataset.test)
    if held_out is not dataset.test:
        kept += len(held_out)
    found.resident_bytes = 3 * math.prod(side) * kept
    counts = {"training": len(dataset.train)}
    if args.validation_fraction:
        counts["held-out"] = len(held_out)
    if len(test):
        counts["test"] = len(dataset.test)
    images = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    return f"{name}: {images} images, {classes} classes{note}"


def known_images(
    args: TrainingArguments, root: Path
) -> tuple[dict[str, NDArray[Any]], int, tuple[int, int], str]:
    """Labels [N] by split, the number of classes, (H, W) as stored, and a word on what is to do.

    Raises BadInput where they cannot be had, and Note where nothing is known before they are here.
    """
    name = args.dataset
    if name in TORCHVISION_SIZES:
        train, test, classes = TORCHVISION_SIZES[name]
        labels = {"train": np.arange(train) % classes, "test": np.arange(test) % classes}
        return labels, classes, (32, 32), check_download(name, root)
    if is_hub_id(name) and not Path(name).is_dir() and not hub_marker(root, name).exists():
        require_network(f"--dataset {name}", "pass a local folder in the same layout")
        raise Note(
            f"{name}: to download from the hub; how many images it holds is not known before"
        )
    raws = dict(find_source(name, root, lambda line: None).read())
    labels = {split: np.asarray(raw.labels) for split, raw in raws.items()}
    side, seconds = stored_side(raws["train"], args.stored_size or args.input_size)
    note = ""
    if not isinstance(raws["train"].items, np.ndarray):
        images = sum(map(len, labels.values()))
        size = in_bytes(3 * math.prod(side) * images)
        time_taken = in_time(seconds * images / (os.cpu_count() or 1))
        note = (
            f"; decoded once, in about {time_taken}, to {side[1]}x{side[0]}: {size} on disk, and "
            "as much memory"
        )
    return labels, len(raws["train"].classes), side, note


def check_download(name: str, root: Path) -> str:
    """A word where torchvision's set is still to be downloaded. Raises BadInput if it cannot be."""
    folder = "cifar-10-batches-py" if name == "cifar10" else "cifar-100-python"
    if (root / folder).exists():
        return ""
    try:
        socket.create_connection((CIFAR_HOST, 443), timeout=5).close()
    except OSError as e:
        raise BadInput(
            f"{name} is not in {root}, and {CIFAR_HOST} cannot be reached ({e}); "
            "pass --dataset FOLDER in hub parquet layout"
        ) from e
    return "; to download"


def stored_side(raw: Any, side: int) -> tuple[tuple[int, int], float]:
    """(H, W) of the images as they will be stored, and the seconds that decoding one takes.

    Judged by 32 of them, from the first to the last. `side` is that of copies.
    """
    begin = time.monotonic()
    places = range(0, len(raw.items), max(1, len(raw.items) // 32))
    shapes = {image_shape(raw, i) for i in places}
    seconds = (time.monotonic() - begin) / len(places)
    shape = shapes.pop()
    if shapes or math.prod(shape) > max(MOST_STORED, side) ** 2:
        shape = (side, side)
    return shape, seconds


def check_batch(found: Findings) -> str:
    """The global batch can be cut, and an epoch has a step."""
    if found.training_images is None:
        raise Note("not known without the data")
    # The same plan that a start would train by.
    accumulation = whole_number(ACCUMULATION)
    found.plan = make_plan(
        found.args, found.training_images, found.processes, accumulation=accumulation
    )
    return f"{found.plan.lines()['batch']}; {found.plan.steps_per_epoch:,} steps an epoch"


def check_schedule(found: Findings) -> str:
    """The optimizer and the schedule exist; the learning rate by steps."""
    check_names(found.args)
    plan = found.plan
    if plan is None:
        raise Note("not known without the data")
    if not found.is_planned:
        raise Note("by --budget: see time")
    steps = f"{plan.total_steps:,} steps{plan.sizes_left_out()}, {plan.warmup_steps:,} of warm-up"
    return f"{found.args.scheduler}, {steps}: {plan.rates()}"


def check_weights(found: Findings) -> str:
    """The model exists and its starting weights are here or can be had."""
    # Of a download it says something; else the weights are here.
    said: list[str] = []
    check_model(found.args, said.append)
    if said:
        return said[0].removeprefix("model: ")
    start = "its own" if found.args.pretrained else "none: random"
    return f"{name_of(found.args)}; starting weights: {found.args.checkpoint or start}"


def check_memory(found: Findings) -> str:
    """The device holds a micro-batch; the optimizer and --checkpoint fit the model."""
    # Made without its weights, which may still be to download.
    args = found.args
    bare = replace(args, pretrained=False)
    check_names(bare)
    check_model(bare, lambda line: None)
    model = build_model(bare, found.classes or 100, lambda line: None)
    build_optimizer(model, args)
    found.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    # What one process needs.
    device = chosen_device(args.device)
    resident = found.resident_bytes if args.pipeline == "device" else 0
    reduced = torch.autocast("cpu", torch.bfloat16) if found.precision != "no" else nullcontext()
    # The weights, their gradients, the optimizer's moments, the average.
    copies = 2 + moments_per_weight(args) + args.model_ema
    need = estimate(model, args.input_size, copies, resident, lambda: reduced)

    # What each of them can have.
    free = free_memory(device)
    devices = torch.cuda.device_count() if device.type == "cuda" else 1
    room = int(free / (math.ceil(found.local_processes / devices) * SCRATCH))

    plan = found.plan
    images = plan.order.micro_batch_size if plan else args.batch_size
    text = (
        f"about {in_bytes(need.total(images))} a process: {in_bytes(need.fixed)} weights, "
        f"gradients, optimizer and images, {in_bytes(need.per_image * images)} for {images} images "
        f"at once; {in_bytes(free)} free on {device.type}"
    )
    if device.type == "cpu":
        text += "; the libraries take nearly 1 GiB more"
    if not found.is_planned:
        text += f"; at {args.input_size} px, and --budget may choose others"
    if need.total(images) > room:
        raise BadInput(f"{text}. {what_would_fit(args, plan, need, room)}")
    found.fits = True
    return text


def what_would_fit(args: TrainingArguments, plan: Plan | None, need: Estimate, room: int) -> str:
    """What to change when a step needs more than `room` bytes."""
    share = args.batch_size // (plan.order.world if plan else 1)
    for size in micro_batch_sizes(args, share):
        if need.total(size) <= room:
            return how_to_cut(plan, size) if plan else f"Give --micro-batch-size {size}"
    return "Take a smaller --model or --image-size"


def check_time(found: Findings) -> str:
    """How long the run takes, by a few steps on black images; with --budget, its plan."""
    # Weights that are not here do not matter for that.
    if found.failed not in ([], ["model"]) or not (found.plan and found.splits and found.fits):
        raise Note("not known without data, model and memory")
    if found.processes > 1:
        raise Note("not timed for several processes")
    # The weights need not be here.
    args = replace(found.args, pretrained=False, checkpoint=None)
    path = folder_of(args)
    ranks = join_processes(args.device, found.precision)
    splits = with_pixels(found.splits, found.side)
    if not found.is_planned:
        opened = Opened(path, origin=found.origin)
        args, _, _ = fit_to_budget(args, found.origin, opened, ranks, StopRequest(), splits)
        plan = f"--image-size {args.image_size} --epochs {args.epochs}"
        if args.plan_of:
            return f"as in {args.plan_of}: {plan}"
        return f"fits into {args.budget}: {plan}"

    start = Start(path, ranks, StopRequest(), splits)
    speed = UNKNOWN
    for side, _ in args.sizes:
        speed = time_side(args, found.origin, start, side, SECONDS_TO_TIME, speed)
    epoch = speed.epoch(args.sizes, found.plan.steps_per_epoch)
    epochs = found.plan.stop_step / found.plan.steps_per_epoch
    whole = f"{in_time(epochs * epoch)}: {epochs:.3g} epochs of {in_time(epoch)}"
    return f"about {whole}, by a few steps: {speed.in_words()}"


def check_folder(found: Findings) -> str:
    """The run folder is new, or holds this run."""
    # It can be written.
    opened = Opened(folder_of(found.args), origin=found.origin)
    there = nearest_folder(opened.path)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BadInput(f"{there} cannot be written; give another --save-dir")
    # It is new, finished, or what this command would go on with.
    said: list[str] = []
    look_inside(opened, found.args, found.precision, said.append)
    if opened.finished:
        raise Note(said[-1].removeprefix("run: "))
    if not opened.sources:
        return f"{opened.path}, a new run"
    # Nobody writes it now.
    if (opened.path / LOCK).is_file():
        try:
            FileLock(opened.path / LOCK).acquire(timeout=0).lock.release()
        except Timeout:
            raise BadInput(
                f"{opened.path} is in use by another process; wait, or give another --run-name"
            ) from None
    # Which of its checkpoints is whole.
    chosen = checkpoint.choose(opened, said.append)
    passed_over = "".join(f"; {line.removeprefix('resume: ')}" for line in said)
    start = chosen.name if chosen else "its beginning"
    return f"{opened.path} goes on from {start}{passed_over}"


def check_disk(found: Findings) -> str:
    """There is room for the checkpoints; what the decoded images take, which may be there."""
    args = found.args
    if not found.weight_bytes:
        raise Note("not known without the model")
    one = found.weight_bytes * (1 + moments_per_weight(args) + args.model_ema)
    # One more while it is written, and the weights at the end.
    need = one * (args.keep_checkpoints + 1) + found.weight_bytes
    free = shutil.disk_usage(nearest_folder(home(args.save_dir))).free
    text = (
        f"{in_bytes(need)} for {args.keep_checkpoints} checkpoints of {in_bytes(one)} and one "
        f"being written; {in_bytes(free)} free"
    )
    if found.image_bytes:
        room = shutil.disk_usage(nearest_folder(home(args.data_dir))).free
        text += f"; decoded images: {in_bytes(found.image_bytes)}, {in_bytes(room)} free there"
    if need > free:
        raise BadInput(f"{text}; make room in {args.save_dir}, or give another --save-dir")
    return text


def check_tracker(found: Findings) -> str:
    """Where the figures go."""
    if found.args.tracker == "none":
        return "none; metrics.jsonl in the run folder"
    try:
        import wandb
    except ImportError as e:
        raise Note("wandb is not installed: metrics.jsonl alone; pip install wandb") from e
    mode = wandb_mode()
    hint = "; wandb login puts it online" if mode == "offline" else ""
    return f"wandb {wandb.__version__}, {mode}{hint}"


CHECKS: dict[str, Callable[[Findings], str]] = {
    "device": check_the_device,
    "precision": check_precision,
    "launcher": check_the_launcher,
    "data": check_data,
    "batch": check_batch,
    "schedule": check_schedule,
    "model": check_weights,
    "memory": check_memory,
    "time": check_time,
    "run": check_folder,
    "disk": check_disk,
    "tracker": check_tracker,
}


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
