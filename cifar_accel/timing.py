"""How long steps and evaluations take on this machine, found by taking a few."""

import contextlib
import io
import math
import time
from dataclasses import replace
from typing import Any

import psutil
import torch

from cifar_accel.budget import (
    LAST_SIZES,
    RESERVE,
    Fitted,
    Speed,
    TooShort,
    fit,
    growing_to,
    lengthened,
)
from cifar_accel.console import say
from cifar_accel.errors import BadInput
from cifar_accel.files import home, read_as
from cifar_accel.machine.processes import Ranks
from cifar_accel.machine.signals import StopRequest
from cifar_accel.models.finetune import can_grow, derived
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.resolve import warmup
from cifar_accel.options.values import parse_duration
from cifar_accel.plan import Plan
from cifar_accel.records.folder import Opened
from cifar_accel.records.meters import Clock
from cifar_accel.records.state import State
from cifar_accel.records.summary import Config
from cifar_accel.run import Run, Splits, set_up
from cifar_accel.step import take_step

# The sides in pixels that are tried. Others are interpolated.
SIDES = (64, 96, 128)
# Steps at each: these first ones, which compile and allocate, are not timed, and then as many as
# take this share of the budget, or these seconds if that is less, but so many at least.
UNTIMED_STEPS = 1
SHARE, SECONDS = 0.01, 3.0
FEWEST_STEPS = 3
# Images over which precisions are compared, and by how much one must be faster to be named.
IMAGES_TO_COMPARE = 64
CLEARLY_FASTER = 1.15
# Images evaluated at each side, and at once.
EVALUATED = 256
# The options that --budget chooses.
PLANNED = ("image_size", "epochs", "warmup_epochs")
# Seconds for what comes after the last evaluation: weights, plots, the tracker's end.
ENDING = 6.0


def fit_to_budget(
    args: TrainingArguments,
    origin: dict[str, str],
    opened: Opened,
    ranks: Ranks,
    stop: StopRequest,
    splits: Splits | None = None,
) -> tuple[TrainingArguments, dict[str, str]]:
    """The options with sizes and epochs that fit into --budget, and where each comes from.

    Steps are timed on `splits` (unset: what --dataset names). All ranks enter. Raises BadInput,
    which names the shortest time, where it is too short.
    """
    assert args.budget
    if args.plan_of:
        return derived(args, origin, plan_of_another(args))
    say(f"budget    {args.budget}: timing a few steps")
    # What is to be chosen. A model that takes one size a run is trained at one of the timed ones.
    chosen = args.sizes if origin["image_size"] == "flag" else None
    sides = tuple(side for side, _ in chosen) if chosen else SIDES
    budget = parse_duration(args.budget, "--budget")
    seconds = min(SECONDS, SHARE * budget)
    speed, plan = time_sizes(args, origin, opened, ranks, stop, sides, seconds, splits)
    if chosen:
        choices = [chosen]
    elif can_grow(args):
        choices = [growing_to(last) for last in LAST_SIZES]
    else:
        choices = [((side, 1.0),) for side in sorted(speed.steps, reverse=True)]

    # What is left, of which the main process's clock is the judge.
    gone = time.time() - psutil.Process().create_time()
    left = ranks.from_main(budget - gone - ENDING)
    epochs = args.epochs if origin["epochs"] == "flag" else 0
    steps = plan.steps_per_epoch
    try:
        fitted = fit(left, speed, steps, choices, epochs)
    except TooShort as e:
        shortest = math.ceil((e.seconds + gone + ENDING) / 60)
        raise BadInput(f"--budget {args.budget}: too short; the shortest is {shortest}m") from e
    best = fitted[0] if chosen else lengthened(fitted[0], left, speed, steps)
    explain(best, fitted[1:], speed, left, gone)

    args, origin = derived(args, origin, {"image_size": best.image_size, "epochs": best.epochs})
    return derived(args, origin, warmup(replace(args, warmup_epochs=None), set()))


def plan_of_another(args: TrainingArguments) -> dict[str, Any]:
    """Sizes and epochs of the run that --plan-of names. Raises BadInput."""
    folder = home(str(args.plan_of))
    config = read_as(Config, folder / "config.json")
    if config is None or config.options.budget != args.budget:
        raise BadInput(f"--plan-of {folder}: holds no run of --budget {args.budget}")
    say(f"budget    {args.budget}: the plan of {folder}")
    return {name: getattr(config.options, name) for name in PLANNED}


def explain(best: Fitted, others: list[Fitted], speed: Speed, left: float, gone: float) -> None:
    """Print what was measured, what was chosen and why, and what else would have fitted."""
    steps = ", ".join(f"{seconds:.3g} s at {side} px" for side, seconds in speed.steps.items())
    evaluations = ", ".join(f"{seconds:.0f}" for seconds in speed.evaluations.values())
    say(f"budget    a step takes {steps}; an evaluation {evaluations} s")
    say(f"budget    {gone:.0f} s are gone, {RESERVE:.0%} of the other {left:.0f} are kept back")
    say("budget    sizes                   epochs  minutes  points lost to size and epochs")
    for choice in (best, *others):
        sizes, minutes = str(choice.image_size), choice.seconds / 60
        mark = "  <- this" if choice is best else ""
        say(f"budget    {sizes:<24}{choice.epochs:>6}{minutes:>9.1f}{choice.lost:>9.1f}{mark}")


def time_sizes(
    args: TrainingArguments,
    origin: dict[str, str],
    opened: Opened,
    ranks: Ranks,
    stop: StopRequest,
    sides: tuple[int, ...] = SIDES,
    seconds: float = SECONDS,
    splits: Splits | None = None,
) -> tuple[Speed, Plan]:
    """Seconds of a step and of an evaluation by side, and the plan of a run at the last side.

    Steps of each side are taken for `seconds`, on `splits` (unset: what --dataset names). All ranks
    enter; of their times the longest count. Each side's run is set up as a training is, and is
    forgotten. Raises BadInput as `set_up` does.
    """
    accelerator = ranks.accelerator
    accumulation = accelerator.gradient_accumulation_steps
    scaler_state = accelerator.scaler.state_dict() if accelerator.scaler else {}
    origin = origin | {"image_size": "flag"}
    steps = {}
    evaluations = {}
    for side in sides:
        # What it says of itself is said by the run that follows.
        with contextlib.redirect_stdout(io.StringIO()):
            run, state = set_up(replace(args, image_size=side), origin, opened, ranks, stop, splits)
        steps[side] = max(ranks.gather(_seconds_of_a_step(run, state, seconds)))
        evaluations[side] = max(ranks.gather(_seconds_of_an_evaluation(run)))
        plan = run.plan
        if side == sides[0]:
            _name_a_faster_precision(run, side)
        # The training begins as if nothing had been before. Accelerate would unscale the gradients
        # of every optimizer that it has prepared.
        del run
        accelerator.free_memory()
        accelerator.gradient_accumulation_steps = accumulation
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(scaler_state)
    return Speed(steps, evaluations), plan


def _seconds_of_a_step(run: Run, state: State, seconds: float) -> float:
    """Seconds of an optimizer step, over `seconds`; its images are made as in training."""
    run.model.module.train()
    batches = run.data.train.training_batches(
        run.plan.order, 0, run.plan.total_steps, run.plan.image_size
    )
    clock = Clock(state)
    step = 0
    began = time.perf_counter()
    with contextlib.closing(batches):
        while step < run.plan.total_steps:
            take_step(run, step, batches, clock)
            # The host waits here.
            run.sums.values.tolist()
            step += 1
            if step == UNTIMED_STEPS:
                began = time.perf_counter()
            timed = step - UNTIMED_STEPS
            passed = time.perf_counter() - began
            # All ranks take as many steps, since they exchange gradients.
            if run.ranks.any(timed >= FEWEST_STEPS and passed > seconds)[0]:
                return passed / timed
    return (time.perf_counter() - began) / max(1, step - UNTIMED_STEPS)


def _name_a_faster_precision(run: Run, side: int) -> None:
    """Say so where fp32 or bf16, which the launcher did not choose, is clearly faster here."""
    chosen = run.ranks.accelerator.mixed_precision
    if chosen not in ("no", "bf16"):
        return
    other = "bf16" if chosen == "no" else "no"
    factor = _seconds_of_passes(run, side, chosen) / _seconds_of_passes(run, side, other)
    if factor > CLEARLY_FASTER:
        say(
            f"note      --mixed_precision {other} is {factor:.1f} times as fast here; it is the "
            f"launcher's: ACCELERATE_MIXED_PRECISION={other}"
        )


def _seconds_of_passes(run: Run, side: int, precision: str) -> float:
    """Seconds of a forward and a backward pass over a few images at `precision` (no or bf16)."""
    device = run.ranks.device
    # Accelerate has put its own precision around the forward pass.
    forward = getattr(run.model.module, "_original_forward", run.model.module.forward)
    weights = [p for p in run.model.module.parameters() if p.requires_grad]
    images = min(run.plan.order.micro_batch_size, IMAGES_TO_COMPARE)
    x = torch.zeros(images, 3, side, side, device=device)
    x = x.contiguous(memory_format=run.model.layout)
    # The first makes what the second finds made.
    for _ in range(2):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = forward(x)
        gradients = torch.autograd.grad(logits.float().sum(), weights, allow_unused=True)
        # The host waits here.
        sum(g.sum() for g in gradients if g is not None).item()  # type: ignore[union-attr]
    return time.perf_counter() - began


def _seconds_of_an_evaluation(run: Run) -> float:
    """Seconds of an evaluation of the split that is evaluated while training, by a part of it."""
    pipeline = run.data.evaluation
    size = min(run.plan.evaluation_batch_size, EVALUATED, len(pipeline.split))
    model = run.model.evaluated.eval()
    batches = pipeline.evaluation_batches(size, run.ranks.world, run.ranks.rank)
    seconds = 0.0
    with contextlib.closing(batches), torch.no_grad(), run.ranks.accelerator.autocast():
        # The first makes what the second finds made.
        for _ in range(2):
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            logits = model(batch.images.contiguous(memory_format=run.model.layout))
            # The host waits here.
            logits.sum().item()
            seconds = (time.perf_counter() - began) / len(batch.labels)
    return seconds * len(pipeline.split) / run.ranks.world
