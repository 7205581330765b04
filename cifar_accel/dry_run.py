"""`--dry-run`: what would be trained, where every value comes from, and what this machine lacks for it. Starts nothing.

Each check is a function of the plan that returns a line, raises Note for what deserves a look, or BadInput for what
would refuse or spoil the run; both say what to do. A new check is one such function and its name in CHECKS.
"""

import math
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from cifar_accel.data.datasets import Dataset, Split, find_source, hub_marker, is_hub_id
from cifar_accel.data.decode import image_shape
from cifar_accel.data.order import Order
from cifar_accel.errors import BadInput
from cifar_accel.files import home
from cifar_accel.launch import command
from cifar_accel.machine import memory
from cifar_accel.machine.memory import sized
from cifar_accel.machine.processes import check_launch
from cifar_accel.models.create import build_model, check_model, name_of
from cifar_accel.network import require_network
from cifar_accel.optim.optimizers import build_optimizer, check_names
from cifar_accel.optim.schedules import learning_rate
from cifar_accel.options.options import TrainingArguments, flag
from cifar_accel.records import checkpoint
from cifar_accel.records.folder import Opened, folder_of, look_inside
from cifar_accel.records.trackers import wandb_mode
from cifar_accel.run import cut_batch, cut_splits, warmup_steps

# What torchvision's two sets hold, whether they are on this machine or not: training images, test images, classes.
NOMINAL, HOST = (
    {"cifar100": (50_000, 10_000, 100), "cifar10": (50_000, 10_000, 10)},
    "www.cs.toronto.edu",
)


class Note(Exception):
    """Nothing that ends a run, but something that its owner may not know."""


@dataclass
class Plan:
    """What the checks look at."""

    args: TrainingArguments
    precision: str
    processes: int
    local: int  # of them on this machine
    images: tuple[int, int, int] | None = None  # training images, test images, classes
    stored: int = 0  # images of all splits
    shape: tuple[int, int] = (0, 0)  # of one, height and width
    order: Order | None = None
    weight_bytes: int = 0  # of a float32 copy of the model


def dry_run(args: TrainingArguments, origin: dict[str, str], say: Callable[[str], None]) -> int:
    """Print the plan and the checks; 2 when a check says that the run would not work, else 0. Writes nothing."""
    processes = max(
        1, int(os.environ.get("CIFAR_ACCEL_PROCESSES", os.environ.get("WORLD_SIZE", "1")))
    )
    local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    plan = Plan(args, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), processes, local)
    say("\noptions (flag over recipe over default; precision and processes are the launcher's)")
    for f in fields(args):
        value = getattr(args, f.name)
        shown = (
            "none"
            if value is None
            else " ".join(map(str, value))
            if isinstance(value, tuple)
            else str(value)
        )
        say(f"  {flag(f.name):<22} {shown or '-':<28} {origin[f.name]}")
    from_launcher = "launcher" if "ACCELERATE_MIXED_PRECISION" in os.environ else "default"
    say(f"  {'mixed precision':<22} {plan.precision:<28} {from_launcher}")
    say(f"  {'processes':<22} {processes:<28} {'launcher' if processes > 1 else 'default'}")
    say("\nplan and health")
    bad = 0
    for name, check in CHECKS.items():
        try:
            mark, text = "ok", check(plan)
        except Note as e:
            mark, text = "note", str(e)
        except (BadInput, OSError, RuntimeError) as e:  # torch, of a device that is not there
            mark, text, bad = "BAD", " ".join(str(e).split()), bad + 1
        say(f"  {mark:<5} {name:<10} {text}")
    say(
        f"\n{bad} of {len(CHECKS)} checks failed"
        if bad
        else "\nnothing is in the way; the same command without --dry-run trains"
    )
    return 2 if bad else 0


def check_device(plan: Plan) -> str:
    """The device is there."""
    check_launch(plan.args.device, plan.precision)
    if device_of(plan).type == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if plan.local > len(names):
            raise Note(
                f"{plan.local} processes share {len(names)} GPU: {', '.join(names)}, over gloo: slow, for tests"
            )
        return ", ".join(names)
    return f"{device_of(plan).type}, {os.cpu_count()} cores"


def check_precision(plan: Plan) -> str:
    """The device computes fast at the precision asked for."""
    if plan.precision == "bf16" and device_of(plan).type == "cpu":
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        if "avx512_bf16" not in flags and "amx_bf16" not in flags:
            raise Note(
                "bf16 is slower than fp32 on this processor (neither avx512_bf16 nor amx_bf16): take no"
            )
    if (
        plan.precision == "bf16"
        and device_of(plan).type == "cuda"
        and not torch.cuda.is_bf16_supported(False)
    ):
        raise Note("bf16 is emulated on this GPU: launch with --mixed_precision fp16 or no")
    return {"no": "fp32"}.get(plan.precision, plan.precision)


def check_launcher(plan: Plan) -> str:
    """How many processes the user's accelerate config starts."""
    file, why = command.config_file()
    config = command.read_launcher_config(file) if file else {}
    kind, n = str(config.get("distributed_type", "NO")), int(config.get("num_processes") or 1)
    if kind == "MULTI_CPU":
        raise Note(
            f"{file} says MULTI_CPU and {n} processes, but accelerate launch starts ONE with it; ./launch.sh starts "
            f"{n}, and so does torchrun --standalone --nproc_per_node {n} -m cifar_accel"
        )
    return f"./launch.sh would take {file} ({why})" if file else f"no accelerate config ({why})"


def check_port(plan: Plan) -> str:
    """Several processes of `accelerate launch` find each other through a port that is free."""
    file, _ = command.config_file()
    config = command.read_launcher_config(file) if file else {}
    if plan.processes == 1 or "RANK" in os.environ or config.get("distributed_type") == "MULTI_CPU":
        return "not needed, or taken by the launcher"
    port = int(os.environ.get("MASTER_PORT") or config.get("main_process_port") or 29500)
    with socket.socket() as s:
        try:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("", port))
        except (OSError, OverflowError) as e:
            raise BadInput(
                f"{port}: {e}; set MASTER_PORT, or main_process_port in the config"
            ) from e
    return f"{port} is free"


def check_data(plan: Plan) -> str:
    """The images are here, or can be had, and can be cut as the options say."""
    args, root, note = plan.args, home(plan.args.data_dir), ""
    if not os.access(existing(root), os.W_OK):
        raise BadInput(f"--data-dir {args.data_dir}: {existing(root)} cannot be written")
    name = args.dataset
    if name in NOMINAL:
        train, test, classes = NOMINAL[name]
        labels, plan.shape = (np.arange(train) % classes, np.arange(test) % classes), (32, 32)
        if not any(root.glob("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")):
            note = "; to download"
            try:
                socket.create_connection((HOST, 443), timeout=5).close()
            except OSError as e:
                remedy = "pass --dataset FOLDER in hub parquet layout"
                raise BadInput(
                    f"{name} is not in {root}, and {HOST} cannot be reached ({e}); {remedy}"
                ) from e
    elif is_hub_id(name) and not Path(name).is_dir() and not hub_marker(root, name).exists():
        require_network(f"--dataset {name}", "pass a local folder in the same layout")
        raise Note(
            f"{name}: to download from the hub; how many images it holds is not known before"
        )
    else:
        raws = dict(find_source(name, root, lambda line: None).read())
        labels = (np.asarray(raws["train"].labels), np.asarray(raws["test"].labels))
        classes, n = len(raws["train"].classes), len(raws["train"].items)
        shapes = {image_shape(raws["train"], i) for i in range(0, n, max(1, n // 32))}
        plan.shape = shapes.pop() if len(shapes) == 1 else (args.image_size, args.image_size)
    plan.stored = len(labels[0]) + len(labels[1])
    names = [str(c) for c in range(classes)]
    both = [Split(np.empty((len(own), 0), np.uint8), own.astype(np.int64), names) for own in labels]
    data, held_out = cut_splits(args, Dataset(name, both[0], both[1], ""), min(plan.shape))
    plan.images = (len(data.train), len(data.test), classes)
    held = f", {len(held_out):,} held out" if args.validation_fraction else ""
    return f"{name}: {plan.images[0]:,} training{held}, {plan.images[1]:,} test images, {classes} classes{note}"


def check_batch(plan: Plan) -> str:
    """The global batch can be cut, and an epoch has a step."""
    if plan.images is None:
        raise Note("not known without the data")
    accumulation = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))
    plan.order = order = cut_batch(plan.args, plan.images[0], plan.processes, 0, accumulation)
    return f"{order.arithmetic()}; {order.steps_per_epoch:,} steps an epoch"


def check_schedule(plan: Plan) -> str:
    """The learning rate by steps."""
    check_names(plan.args)
    if plan.order is None:
        raise Note("not known without the data")
    args, total = plan.args, plan.args.epochs * plan.order.steps_per_epoch
    warmup = warmup_steps(args, plan.order)
    at = sorted({0, warmup, total // 2, total - 1})
    rates = ", ".join(f"{learning_rate(s, total, warmup, args):.3g} at {s:,}" for s in at)
    return f"{args.scheduler}, {total:,} steps, {warmup:,} of warm-up: {rates}"


def check_weights(plan: Plan) -> str:
    """The model exists and its starting weights are here or can be had."""
    said: list[str] = []
    check_model(plan.args, said.append)
    if said:
        return said[0].removeprefix("model: ")
    start = plan.args.checkpoint or ("its own" if plan.args.pretrained else "none: random")
    return f"{name_of(plan.args)}; starting weights: {start}"


def check_memory(plan: Plan) -> str:
    """The device holds a micro-batch; the optimizer and --checkpoint fit the model."""
    args = plan.args
    classes = plan.images[2] if plan.images else 100
    model = build_model(replace(args, pretrained=False), classes, lambda line: None)
    build_optimizer(model, args)
    plan.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    device = device_of(plan)
    resident = 3 * math.prod(plan.shape) * plan.stored if args.pipeline == "device" else 0
    autocast = torch.autocast("cpu", torch.bfloat16) if plan.precision != "no" else nullcontext()
    need = memory.estimate(args, model, resident, lambda: autocast)
    order = plan.order or Order(0, 1, args.batch_size)
    free = memory.available(device)
    devices = torch.cuda.device_count() if device.type == "cuda" else 1
    sharing = math.ceil(plan.local / devices)
    text = (
        f"about {sized(need.total(order.micro_batch_size))} a process: {sized(need.fixed)} weights, gradients, "
        f"optimizer and images, {sized(need.per_image * order.micro_batch_size)} for {order.micro_batch_size} images "
        f"at once; {sized(free)} free on {device.type}"
    )
    text += "; the libraries take nearly 1 GiB more" if device.type == "cpu" else ""
    remedy = memory.shortage(args, order, need, int(free / (sharing * memory.SCRATCH)))
    if remedy:
        raise BadInput(f"{text}. {remedy}")
    return text


def check_folder(plan: Plan) -> str:
    """The run folder is new, or holds this run."""
    opened = Opened(folder_of(plan.args))
    there = existing(opened.path)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BadInput(f"{there} cannot be written; give another --save-dir")
    said: list[str] = []
    look_inside(opened, plan.args, plan.precision, said.append)
    if opened.finished:
        raise Note(said[-1].removeprefix("run: "))
    if opened.resume_from is None:
        return f"{opened.path}, a new run"
    source = opened.resume_from
    if (opened.path / ".lock").is_file():
        try:
            FileLock(opened.path / ".lock").acquire(timeout=0).lock.release()
        except Timeout:
            raise BadInput(
                f"{opened.path} is in use by another process; wait, or give another --run-name"
            ) from None
    found = checkpoint.choose([source, opened.fallback], said.append)
    passed = "".join(f"; {line.removeprefix('resume: ')}" for line in said)
    return f"{opened.path} goes on from {found.name if found else 'its beginning: it has no checkpoint'}{passed}"


def check_disk(plan: Plan) -> str:
    """There is room for the checkpoints."""
    args = plan.args
    moments = memory.MOMENTS.get(args.optimizer, 2) + args.amsgrad
    one = plan.weight_bytes * (1 + moments + args.model_ema)
    need = one * (args.keep_checkpoints + 1) + plan.weight_bytes
    free = shutil.disk_usage(existing(home(args.save_dir))).free
    text = f"{sized(need)} for {args.keep_checkpoints} checkpoints of {sized(one)} and one being written; "
    text += f"{sized(free)} free"
    if need > free:
        raise BadInput(f"{text}; make room in {args.save_dir}, or give another --save-dir")
    return text


def check_tracker(plan: Plan) -> str:
    """Where the figures go."""
    if plan.args.tracker == "none":
        return "none; metrics.jsonl in the run folder"
    try:
        import wandb
    except ImportError as e:
        raise Note("wandb is not installed: metrics.jsonl alone; pip install wandb") from e
    mode = wandb_mode()
    return f"wandb {wandb.__version__}, {mode}" + (
        "; wandb login puts it online" if mode == "offline" else ""
    )


CHECKS: dict[str, Callable[[Plan], str]] = {
    "device": check_device,
    "precision": check_precision,
    "launcher": check_launcher,
    "port": check_port,
    "data": check_data,
    "batch": check_batch,
    "schedule": check_schedule,
    "model": check_weights,
    "memory": check_memory,
    "run": check_folder,
    "disk": check_disk,
    "tracker": check_tracker,
}


def device_of(plan: Plan) -> torch.device:
    """The device that the run would take."""
    kinds = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    wanted = (
        "cpu"
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
        else plan.args.device
    )
    return torch.device(
        wanted if wanted != "auto" else next(kind for kind, there in kinds.items() if there)
    )


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())
