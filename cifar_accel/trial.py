"""Whether a step fits into a device's memory, found by trying; and what to change when it does not.

A GPU is tried before the first step. On any device the remedy for an "out of memory" is found by
trying smaller micro-batches, so that it names one that works.
"""

import gc
from typing import Any

import torch
import torch.nn.functional as F

from cifar_accel.errors import DoesNotFit, OutOfMemory
from cifar_accel.machine.memory import buffers_restored, is_out_of_memory
from cifar_accel.models.create import has_batch_norm
from cifar_accel.optim.optimizers import moments_per_weight
from cifar_accel.plan import Plan, micro_batch_sizes
from cifar_accel.run import Run

# A backward pass that fails on a host leaves tasks in a queue of its thread, which keep their
# tensors alive. A backward pass through an older node empties the queue; this is such a node.
OLDEST_NODE = torch.ones((), requires_grad=True) * 1


def check_memory(run: Run) -> None:
    """Try one step on a CUDA device before the first. All ranks enter.

    A rank that fails ends all of them: raises DoesNotFit with the remedy. A compiled model takes
    another path through memory, and a trial would compile it for shapes of its own: it is not
    tried.
    """
    if run.ranks.device.type != "cuda" or run.model.compiled:
        return
    # Each rank tries its own device; all hear of the first that fails.
    size = run.plan.order.micro_batch_size
    own = None if step_fits(run, size) else remedy(run, size)
    for text in run.ranks.gather(own):
        if text:
            raise DoesNotFit(text)


def memory_explained(error: BaseException, run: Run, images: int, where: str = "") -> BaseException:
    """OutOfMemory with a remedy where `error` says that `images` are too many; else `error`."""
    if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
        return error
    # The frames of the traceback hold the step's tensors, which the trial needs the room of.
    error.__traceback__ = None
    return OutOfMemory(remedy(run, images, where))


def remedy(run: Run, images: int, where: str = "") -> str:
    """One line: the largest micro-batch of at most half of `images` that fits, found by trying."""
    # What failed, and what can be tried instead.
    plan = run.plan
    head = f"out of memory on {run.ranks.device} with {images} images at once{where}"
    share = plan.order.batch_size // plan.order.world
    run.optimizer.zero_grad(set_to_none=True)
    # Batch norm refuses a single image.
    smallest = 2 if has_batch_norm(run.model.module) else 1
    for size in micro_batch_sizes(plan.args, share):
        if smallest <= size <= images // 2 and step_fits(run, size):
            return (
                f"{head}: {size} fit. {how_to_cut(plan, size)}: {share // size} accumulation "
                f"steps, the global batch stays {plan.order.batch_size}, and the run goes on"
            )
    return f"{head}, and no smaller part fits either; take a smaller --model or --image-size"


def how_to_cut(plan: Plan, size: int) -> str:
    """How to make `size` images the micro-batch."""
    # Of the two only --micro-batch-size bounds evaluations too.
    if plan.accumulation > 1 and not plan.args.micro_batch_size:
        return f"Give --micro-batch-size {size} and leave gradient_accumulation_steps away"
    return f"Give --micro-batch-size {size}"


def step_fits(run: Run, images: int) -> bool:
    """Whether forward, backward and the optimizer's moments fit with `images` at once.

    Changes nothing. Each rank tries for itself: gradients are asked for without the parameters'
    hooks, so DDP takes no notice. The host waits for the device.
    """
    device = run.ranks.device
    try:
        free_what_is_unused(device)
        _try_step(run, images)
        return True
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        return False
    finally:
        free_what_is_unused(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)


def _try_step(run: Run, images: int) -> None:
    """One step without its update, on images of zeros; holds all that a real one holds."""
    model, device, size = run.model, run.ranks.device, run.args.input_size
    weights = [p for p in model.module.parameters() if p.requires_grad]
    # The optimizer's moments, where it has none yet.
    held: list[Any] = []
    if not run.optimizer.state:
        moments = moments_per_weight(run.args, device)
        held += [torch.empty_like(weight) for weight in weights for _ in range(moments)]
    # Forward, loss and gradients, in the layout and precision of the run.
    x = torch.zeros(images, 3, size, size, device=device).contiguous(memory_format=model.layout)
    labels = torch.zeros(images, dtype=torch.int64, device=device)
    # Once oneDNN has had no memory for one of its primitives, it makes none any more.
    with buffers_restored(model.module), torch.backends.mkldnn.flags(enabled=device.type != "cpu"):
        with run.ranks.accelerator.autocast():
            logits = model.module(x)
        loss = F.cross_entropy(logits.float(), labels)
        held += torch.autograd.grad(loss, weights, allow_unused=True)
        # A device reports a failure only when it is waited for.
        loss.item()


def free_what_is_unused(device: torch.device) -> None:
    """Give back the memory that nothing refers to any more."""
    OLDEST_NODE.backward(retain_graph=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
