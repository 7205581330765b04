"""A device's memory: what a training will need of it, what is free, and how its end is worded."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import psutil
import torch

# Kernels' scratch space comes on top of an estimate.
SCRATCH = 1.25

# How torch, CUDA's libraries and oneDNN say that there is no memory.
NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "ALLOC_FAILED",
    "could not create a memory",
    "could not create a primitive",
)
# How oneDNN says that it has no kernel for a type or shape, which is no lack of memory.
NO_KERNEL = "could not create a primitive descriptor"


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training on one device: what is always there, and what each image adds."""

    fixed: int
    per_image: int

    def total(self, images: int) -> int:
        """Bytes with `images` in a micro-batch."""
        return self.fixed + images * self.per_image


def estimate(
    model: torch.nn.Module,
    image_size: int,
    copies: int,
    resident: int,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Estimate:
    """Estimate by forward passes of a few images on the CPU, which leave `model` in training mode.

    Counted are `copies` of each weight (itself, its gradient, moments, average), the `resident`
    bytes of images, and what autograd keeps for the backward pass at the precision that `autocast`
    gives. The libraries, which take nearly 1 GiB a process on a host, and `SCRATCH` are not.
    """
    # The storages are held, or the next tensor might lie where one was counted.
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def count(tensor: torch.Tensor) -> None:
        # Returns nothing: a graph that kept the tensor itself would never be freed.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage

    def bytes_kept(images: int) -> int:
        x = torch.zeros(images, 3, image_size, image_size)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing), autocast():
            logits = model(x)
        del logits
        total = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        return total

    with buffers_restored(model):
        per_image = (bytes_kept(4) - bytes_kept(2)) // 2
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return Estimate(weight_bytes * copies + resident, per_image)


@contextmanager
def buffers_restored(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` into training mode for a trial; afterwards its buffers are as they were."""
    before = [buffer.clone() for buffer in model.buffers()]
    model.train()
    try:
        yield
    finally:
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).replace(NO_KERNEL, "")
    return isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)


def in_bytes(count: float) -> str:
    """Bytes as a person reads them."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.0f} MiB"
