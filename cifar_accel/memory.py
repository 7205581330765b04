"""What a training needs of a device's memory: estimated before it starts, and what to change when it was not there."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from cifar_accel.config import TrainingArguments
from cifar_accel.data.order import Order
from cifar_accel.prepare import Run, evaluation_batch_size

# Numbers that an optimizer keeps for each weight, where that is known.
MOMENTS = {"adamw": 2, "sgdm": 1, "lion": 1}
FAILURES = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "could not create a memory")


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training on one device: what is always there, and what each image of a micro-batch adds."""

    fixed: int
    per_image: int

    def total(self, images: int) -> int:
        """Bytes with `images` at once."""
        return self.fixed + images * self.per_image


def estimate(args: TrainingArguments, model: torch.nn.Module, resident: int, autocast: Callable[[], Any]) -> Estimate:
    """Estimate by one image's forward pass of `model` on the CPU; `resident` bytes are those of the images kept there.

    Counted are weights, gradients, moments, the average, and what autograd keeps for the backward pass. Kernels'
    scratch space is not: take a quarter more. Nor are the libraries, on a host nearly 1 GiB a process.
    """
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def kept(images: int) -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast():
            logits = model(torch.zeros(images, 3, args.image_size, args.image_size))
        del logits
        return sum(saved.values())

    model.train()
    per_image = (kept(4) - kept(2)) // 2
    moments = MOMENTS.get(args.optimizer, 2) + args.amsgrad  # two: most have two at most
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Estimate(weights * (2 + moments + args.model_ema) + resident, per_image)


def available(device: torch.device) -> int:
    """Bytes that this process could still take on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def divisors(size: int) -> list[int]:
    """The micro-batch sizes that cut `size` images of a process into equal parts, the largest first."""
    return [size // parts for parts in range(1, size + 1) if size % parts == 0]


def is_out_of_memory(e: BaseException) -> bool:
    """Whether `e` says that a device, or the host, has no memory left."""
    if isinstance(e, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(e, RuntimeError) and any(text in str(e) for text in FAILURES)


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
    return any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in model.modules())


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
    device, buffers = run.accelerator.device, [b.clone() for b in run.module.buffers()]
    weights = [p for p in run.module.parameters() if p.requires_grad]
    held: list[Any] = []
    try:
        release(device)
        if not run.optimizer.state:
            moments = MOMENTS.get(run.args.optimizer, 0) + run.args.amsgrad
            held += [torch.empty_like(p) for p in weights for _ in range(moments)]
        size = run.args.image_size
        x = torch.zeros(images, 3, size, size, device=device).contiguous(memory_format=run.memory_format)
        with run.accelerator.autocast():
            logits = run.module.train()(x)
        loss = F.cross_entropy(logits.float(), torch.zeros(images, dtype=torch.int64, device=device))
        held += torch.autograd.grad(loss, weights, allow_unused=True)
        loss.item()  # the host waits: a device reports late
        return True
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        return False
    finally:
        for buffer, value in zip(run.module.buffers(), buffers, strict=True):
            buffer.copy_(value)
        held.clear()
        release(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)


def release(device: torch.device) -> None:
    """Give back what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
