"""One optimizer step. Nobody waits for the device here."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from cifar_accel.data.batches import Batch
from cifar_accel.data.order import random_bits
from cifar_accel.machine.processes import Ranks
from cifar_accel.optim.gradients import clip_gradients, gradient_norm
from cifar_accel.plan import Plan
from cifar_accel.records.meters import Clock
from cifar_accel.run import Run


def take_step(run: Run, step: int, micro_batches: Iterator[Batch], clock: Clock) -> None:
    """One optimizer step over the global batch, in micro-batches. All ranks enter; nobody waits.

    Raises Stopped where this process is alone and a signal comes while it waits for the images.
    """
    plan, accelerator = run.plan, run.ranks.accelerator
    # The schedule is a function of the step; a group may scale it (layer decay).
    for group in run.optimizer.param_groups:
        group["lr"] = plan.learning_rate(step) * group.get("lr_scale", 1.0)

    # Forward and backward, micro-batch by micro-batch. Gradients add up on each rank and are
    # exchanged with the last.
    losses = []
    alone = run.ranks.world == 1
    for micro in range(plan.accumulation):
        # The images may never come. Until the first are there, nothing of the step is done.
        with clock.waiting_for_input(), run.stop.interruptible(alone and micro == 0):
            batch = next(micro_batches)
        seed_dropout(plan, run.ranks, step, micro)
        last = micro == plan.accumulation - 1
        with nullcontext() if last else accelerator.no_sync(run.model.wrapped):
            logits = run.model(batch.images)
            loss = run.criterion(logits, batch.targets)
            # DDP averages over the ranks: the result is the mean of the global batch.
            accelerator.backward(loss / plan.accumulation)
        run.sums.add(loss, logits, batch.labels)
        losses.append(loss.detach())

    # The norm is of the gradients before clipping, without the scaler's factor.
    accelerator.unscale_gradients(run.optimizer)
    # On a CPU it takes 1 % of a small model's step, so there it is only taken where it is used.
    norm = None
    if run.args.clip_grad or plan.row_after(step + 1) or run.ranks.device.type != "cpu":
        norm = gradient_norm(run.watch.parameters)
    if run.args.clip_grad and norm is not None:
        clip_gradients(run.model.module, norm, run.args)
    # Remembers the first step that is not finite; nobody waits for the device to know.
    run.watch.note(losses, norm)

    # Accelerate's wrapper looks for packages in every step; only a scaler needs it.
    optimizer = run.optimizer if accelerator.scaler else run.optimizer.optimizer
    optimizer.step()
    run.optimizer.optimizer.zero_grad(set_to_none=True)


def seed_dropout(plan: Plan, ranks: Ranks, step: int, micro: int) -> None:
    """Seed what the model itself draws (dropout, stochastic depth): a resume draws the same.

    The seed is a hash of the step and of the place of this micro-batch in the global batch.
    """
    place = plan.order.positions(micro)[0]
    seed = int(random_bits(plan.args.seed, "dropout", step, place)[0] >> 1)
    # torch.manual_seed would seed every kind of device, at a hundred times the cost.
    torch.default_generator.manual_seed(seed)
    if ranks.device.type == "cuda":
        torch.cuda.default_generators[ranks.device.index or 0].manual_seed(seed)
    elif ranks.device.type == "mps":
        torch.mps.manual_seed(seed)
