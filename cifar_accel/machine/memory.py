"""What a training needs of a device's memory: estimated before it starts, and what to change when it was not there."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from cifar_accel.data.order import Order
from cifar_accel.errors import BadInput
from cifar_accel.options.options import TrainingArguments
from cifar_accel.run import Run, evaluation_batch_size

# Numbers that an optimizer keeps for each weight, where that is known.
MOMENTS = {"adamw": 2, "sgdm": 1, "lion": 1}


SCRATCH = 1.25  # over an estimate, for kernels' scratch space


# As torch, CUDA's libraries and oneDNN word it.
FAILURES = (
    "can't allocate memory",
    "out of memory",
    "ALLOC_FAILED",
    "could not create a memory",
    "could not create a primitive",
)


# Older than any operation of a step. When a backward pass fails on the host, the tasks it had not done stay in the
# queue of this thread, and hold their tensors, until an older task is taken out behind them.
OLDEST = torch.ones((), requires_grad=True) * 1


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training on one device: what is always there, and what each image of a micro-batch adds."""

    fixed: int
    per_image: int

    def total(self, images: int) -> int:
        """Bytes with `images` at once."""
        return self.fixed + images * self.per_image


def estimate(
    args: TrainingArguments, model: torch.nn.Module, resident: int, autocast: Callable[[], Any]
) -> Estimate:
    """Estimate by one image's forward pass of `model` on the CPU; `resident` bytes are those of the images kept there.

    Counted are weights, gradients, moments, the average, and what autograd keeps for the backward pass. Kernels'
    scratch space is not: take a quarter more. Nor are the libraries, on a host nearly 1 GiB a process. The model stays
    as it was.
    """
    saved: dict[
        int, torch.UntypedStorage
    ] = {}  # kept, or the next tensor might lie where one was counted
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(
        tensor: torch.Tensor,
    ) -> None:  # the graph keeps nothing: with the tensor itself it would never be freed
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage

    def kept(images: int) -> int:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing), autocast():
            logits = model(torch.zeros(images, 3, args.image_size, args.image_size))
        del logits
        total = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        return total

    with _buffers_kept(model):
        per_image = (kept(4) - kept(2)) // 2
    moments = MOMENTS.get(args.optimizer, 2) + args.amsgrad  # two: most have two at most
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Estimate(weights * (2 + moments + args.model_ema) + resident, per_image)


@contextmanager
def _buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` into training mode for a trial, and its buffers (batch norm's statistics) back afterwards."""
    kept = [buffer.clone() for buffer in model.buffers()]
    model.train()
    try:
        yield
    finally:
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.copy_(value)


def available(device: torch.device) -> int:
    """Bytes that this process could still take on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def divisors(size: int) -> list[int]:
    """The micro-batch sizes that cut `size` images of a process into equal parts, the largest first."""
    return [size // parts for parts in range(1, size + 1) if size % parts == 0]


def shortage(args: TrainingArguments, order: Order, need: Estimate, room: int) -> str | None:
    """What to change when a step needs more than `room` bytes, or None when it does not."""
    if need.total(order.micro_batch_size) <= room:
        return None
    fit = [size for size in divisors(order.batch_size // order.world) if need.total(size) <= room]
    return remedy(args, order, fit[0]) if fit else "Take a smaller --model or --image-size"


def look_ahead(run: Run) -> None:
    """Find out before the first step whether the device has the memory for one. All ranks enter.

    An accelerator is tried, and a rank that fails ends all by a BadInput with its remedy. On a host, where the system
    would kill this process or a neighbour for trying, an estimate warns.
    """
    args, order, device = run.args, run.order, run.accelerator.device
    if run.compiled:  # another path through memory, and a trial would compile for its own shapes
        return
    if device.type == "cpu":
        if order.micro_batch_size < 4:  # the estimate itself takes as much as a step with four
            return
        try:
            need = estimate(args, run.module, 0, run.accelerator.autocast)
        except (RuntimeError, MemoryError) as e:
            if is_out_of_memory(e):  # so will the step be, and say what to do
                return
            raise
        local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", order.world)))
        room = int(available(device) / (local * SCRATCH))
        text = shortage(args, order, need, room)
        if text and run.is_main:
            size, free = (
                sized(n) for n in (need.total(order.micro_batch_size) * SCRATCH, available(device))
            )
            each = f"in each of {local} processes, " if local > 1 else ""
            run.say(
                f"warning: a step needs about {size}, {each}and {free} are free: the system may kill it. {text}"
            )
    elif device.type == "cuda":
        said = None if fits(run, order.micro_batch_size) else advice(run)
        texts = [said] * order.world
        if run.host_group is not None:
            torch.distributed.all_gather_object(texts, said, group=run.host_group)
        for said in filter(None, texts):  # of whichever device it is
            raise BadInput(said)


def is_out_of_memory(e: BaseException) -> bool:
    """Whether `e` says that a device, or the host, has no memory left."""
    if isinstance(e, torch.OutOfMemoryError | MemoryError):
        return True
    # oneDNN finds no "primitive descriptor" where the type or shape is not supported.
    said = str(e).replace("could not create a primitive descriptor", "")
    return isinstance(e, RuntimeError) and any(text in said for text in FAILURES)


def advice(run: Run) -> str:
    """One line for a run that was out of memory: the largest micro-batch that does fit, found by trying."""
    order, device = run.order, run.accelerator.device
    own = order.batch_size // order.world
    used = evaluation_batch_size(run.args, order) if run.evaluating else order.micro_batch_size
    head = f"out of memory on {device} with {used} images at once{' in an evaluation' if run.evaluating else ''}"
    run.optimizer.zero_grad(set_to_none=True)
    for size in divisors(own):
        if size <= used // 2 and (size > 1 or not _has_batch_norm(run.module)) and fits(run, size):
            parts = own // size
            return (
                f"{head}: {size} fit. {remedy(run.args, order, size)}: {parts} accumulation steps, the global batch "
                f"stays {order.batch_size}, and the run goes on"
            )
    return f"{head}, and no smaller part of the batch fits either; take a smaller --model or --image-size"


def _has_batch_norm(model: torch.nn.Module) -> bool:
    """Whether a layer could refuse a single image."""
    return any(
        isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in model.modules()
    )


def remedy(args: TrainingArguments, order: Order, size: int) -> str:
    """How to make `size` images the micro-batch."""
    if order.accumulation > 1 and not args.micro_batch_size:
        parts = order.batch_size // order.world // size
        return f"Set the launcher's gradient_accumulation_steps to {parts}"
    return f"Give --micro-batch-size {size}"


def fits(run: Run, images: int) -> bool:
    """Whether forward, backward and the optimizer's moments fit with `images` at once; nothing is changed by it.

    Each rank tries for itself: gradients are asked for without the parameters' hooks, so DDP takes no notice.
    """
    device = run.accelerator.device
    weights = [p for p in run.module.parameters() if p.requires_grad]
    held: list[Any] = []
    try:
        release(device)
        if not run.optimizer.state:
            moments = MOMENTS.get(run.args.optimizer, 0) + run.args.amsgrad
            held += [torch.empty_like(p) for p in weights for _ in range(moments)]
        size = run.args.image_size
        x = torch.zeros(images, 3, size, size, device=device).contiguous(
            memory_format=run.memory_format
        )
        # Once oneDNN has had no memory for one of its primitives, it makes none any more in this process.
        with _buffers_kept(run.module), torch.backends.mkldnn.flags(enabled=device.type != "cpu"):
            with run.accelerator.autocast():
                logits = run.module(x)
            loss = F.cross_entropy(
                logits.float(), torch.zeros(images, dtype=torch.int64, device=device)
            )
            held += torch.autograd.grad(loss, weights, allow_unused=True)
            loss.item()  # the host waits: a device reports late
        return True
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        return False
    finally:
        held.clear()
        release(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)


def release(device: torch.device) -> None:
    """Give back what is no longer used."""
    OLDEST.backward(retain_graph=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def sized(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
