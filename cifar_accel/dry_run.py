"""`--dry-run`: what would be trained, where every value comes from, and what this machine lacks for it. Starts nothing.

Each check is a function of the plan that returns a line, raises Note for what deserves a look, or ValueError for what
would refuse or spoil the run; both say what to do. A new check is one such function and its name in CHECKS.
"""

import os
import shutil
import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from cifar_accel import checkpoint, launch, memory
from cifar_accel.config import TrainingArguments, flag
from cifar_accel.data.order import Order
from cifar_accel.data.sources import find_source, hub_marker
from cifar_accel.evaluate import check_launch
from cifar_accel.hub import require_network
from cifar_accel.model import build_model, check_model
from cifar_accel.optim import check_names, learning_rate
from cifar_accel.prepare import cut_batch, name_of, warmup_steps
from cifar_accel.run_folder import changed_options, read_json
from cifar_accel.tracking import wandb_mode

# What torchvision's two sets hold, whether they are on this machine or not: training images, test images, classes.
NOMINAL = {"cifar100": (50_000, 10_000, 100), "cifar10": (50_000, 10_000, 10)}


class Note(Exception):
    """Nothing that ends a run, but something that its owner may not know."""


@dataclass
class Plan:
    """What the checks look at."""

    args: TrainingArguments
    precision: str
    processes: int
    images: tuple[int, int, int] | None = None  # training images, test images, classes
    order: Order | None = None
    weight_bytes: int = 0  # of a float32 copy of the model


def dry_run(args: TrainingArguments, origin: dict[str, str], say: Callable[[str], None]) -> int:
    """Print the plan and the checks; 2 when a check says that the run would not work, else 0. Writes nothing."""
    processes = int(os.environ.get("CIFAR_ACCEL_PROCESSES", os.environ.get("WORLD_SIZE", "1")))
    plan = Plan(args, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), processes)
    say("\noptions (flag over recipe over default; precision and processes are the launcher's)")
    for f in fields(args):
        value = getattr(args, f.name)
        shown = "none" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
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
        except (ValueError, OSError) as e:
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
    if torch.cuda.is_available() and plan.args.device in ("auto", "cuda"):
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if plan.processes > len(names):
            raise Note(
                f"{plan.processes} processes share {len(names)} GPU: {', '.join(names)}, over gloo: slow, for tests"
            )
        return ", ".join(names)
    return f"{device_of(plan).type}, {os.cpu_count()} cores"


def check_precision(plan: Plan) -> str:
    """The device computes fast at the precision asked for."""
    if plan.precision == "bf16" and device_of(plan).type == "cpu":
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        if "avx512_bf16" not in flags and "amx_bf16" not in flags:
            raise Note("bf16 is slower than fp32 on this processor (neither avx512_bf16 nor amx_bf16): take no")
    if plan.precision == "bf16" and device_of(plan).type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise Note("bf16 is emulated on this GPU: launch with --mixed_precision fp16 or no")
    return {"no": "fp32"}.get(plan.precision, plan.precision)


def check_launcher(plan: Plan) -> str:
    """How many processes the user's accelerate config starts."""
    file, why = launch.config_file()
    config = launch.read_config(file) if file else {}
    kind, n = str(config.get("distributed_type", "NO")), int(config.get("num_processes") or 1)
    if kind == "MULTI_CPU":
        raise Note(
            f"{file} says MULTI_CPU and {n} processes, but accelerate launch starts ONE with it; ./launch.sh starts "
            f"{n}, and so does torchrun --standalone --nproc_per_node {n} -m cifar_accel"
        )
    return f"./launch.sh would take {file} ({why})" if file else f"no accelerate config ({why})"


def check_port(plan: Plan) -> str:
    """Several processes find each other through a port that is free."""
    if plan.processes == 1 or "RANK" in os.environ:
        return "not needed" if plan.processes == 1 else "the launcher has taken it"
    port = int(os.environ.get("MASTER_PORT", "29500"))
    with socket.socket() as s:
        try:
            s.bind(("", port))
        except OSError as e:
            raise ValueError(
                f"{port} is in use ({e.strerror}); set MASTER_PORT, or main_process_port in the config"
            ) from e
    return f"{port} is free"


def check_data(plan: Plan) -> str:
    """The images are here, or can be had."""
    args, root, note = plan.args, Path(plan.args.data_dir).expanduser(), ""
    name = args.dataset
    if name in NOMINAL:
        plan.images, host = NOMINAL[name], "www.cs.toronto.edu"
        if not any(root.glob("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")):
            note = "; to download"
            try:
                socket.create_connection((host, 443), timeout=5).close()
            except OSError as e:
                remedy = "pass --dataset FOLDER in hub parquet layout"
                raise ValueError(f"{name} is not in {root}, and {host} cannot be reached ({e}); {remedy}") from e
    elif name.count("/") == 1 and not Path(name).exists() and not hub_marker(root, name).exists():
        require_network(f"--dataset {name}", "pass a local folder in the same layout")
        raise Note(f"{name}: to download from the hub; how many images it holds is not known before")
    else:
        raws = dict(find_source(name, root, lambda line: None).read())
        plan.images = (len(raws["train"].items), len(raws["test"].items), len(raws["train"].classes))
    train, test = args.limit_train or plan.images[0], args.limit_test or plan.images[1]
    train -= round(train * args.validation_fraction)
    plan.images = (train, test, plan.images[2])
    return f"{name}: {train:,} training, {test:,} test images, {plan.images[2]} classes{note}"


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
    """The device holds a micro-batch."""
    classes = plan.images[2] if plan.images else 100
    model = build_model(replace(plan.args, pretrained=False, checkpoint=None), classes, lambda line: None)
    plan.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    side, device = plan.args.image_size, device_of(plan)
    resident = 3 * side * side * sum(plan.images[:2]) if plan.images and plan.args.pipeline == "device" else 0
    autocast = torch.autocast("cpu", torch.bfloat16) if plan.precision != "no" else nullcontext()
    need = memory.estimate(plan.args, model, resident, lambda: autocast)
    local = plan.args.batch_size // plan.processes
    images = plan.order.micro_batch_size if plan.order else plan.args.micro_batch_size or local
    free = memory.available(device)
    shared = plan.processes if device.type == "cpu" else 1
    text = (
        f"about {size(need.total(images))} a process: {size(need.fixed)} weights, gradients, optimizer and images, "
        f"{size(need.per_image * images)} for {images} images at once; {size(free)} free on {device.type}"
    )
    if need.total(images) * 1.25 * shared > free:
        fit = [s for s in memory.divisors(local) if need.total(s) * 1.25 * shared <= free]
        remedy = f"give --micro-batch-size {fit[0]}" if fit else "take a smaller --model or --image-size"
        raise ValueError(f"{text}; {remedy}")
    return text


def check_folder(plan: Plan) -> str:
    """The run folder is new, or holds this run."""
    path = Path(plan.args.save_dir).expanduser() / str(plan.args.run_name)
    there = existing(path)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{there} cannot be written; give another --save-dir")
    config, summary = read_json(path / "config.json"), read_json(path / "summary.json") or {}
    if config is None or plan.args.resume == "never":
        return f"{path}, a new run"
    changed = changed_options(config, plan.args, plan.precision)
    if changed:
        raise ValueError(f"{path} holds another run ({'; '.join(changed)}); give a --run-name, or --resume never")
    if summary.get("status") == "finished":
        raise Note(f"{path} is finished; --resume never trains it anew")
    found = checkpoint.list_checkpoints(path)
    return f"{path} goes on" + (f" from {found[0].name}" if found else " from its beginning: it has no checkpoint")


def check_disk(plan: Plan) -> str:
    """There is room for the checkpoints."""
    args = plan.args
    moments = memory.MOMENTS.get(args.optimizer, 2) + args.amsgrad
    one = plan.weight_bytes * (1 + moments + args.model_ema)
    need = one * (args.keep_checkpoints + 1) + plan.weight_bytes
    free = shutil.disk_usage(existing(Path(args.save_dir).expanduser())).free
    text = (
        f"{size(need)} for {args.keep_checkpoints} checkpoints of {size(one)} and one being written; {size(free)} free"
    )
    if need > free:
        raise ValueError(f"{text}; make room in {args.save_dir}, or give another --save-dir")
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
    return f"wandb {wandb.__version__}, {mode}" + ("; wandb login puts it online" if mode == "offline" else "")


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
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = plan.args.device
    return torch.device(wanted if wanted != "auto" else next(kind for kind, there in kinds.items() if there))


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def size(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
