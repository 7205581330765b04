"""How long steps and evaluations take on this machine, found by taking a few; and what fits."""

import contextlib
import io
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch

from cifar_accel.budget import (
    LAST_SIZES,
    RESERVE,
    Fitted,
    Parts,
    Speed,
    TooShort,
    fit,
    growing_to,
    lengthened,
    one_size,
    text_of,
)
from cifar_accel.console import say
from cifar_accel.data.datasets import Split
from cifar_accel.data.splits import Splits
from cifar_accel.errors import BadInput
from cifar_accel.files import home, read_as
from cifar_accel.machine.processes import Ranks, peers_expected
from cifar_accel.machine.signals import StopRequest
from cifar_accel.models.finetune import derived, sizes_taken
from cifar_accel.options.options import TrainingArguments, flag
from cifar_accel.options.resolve import warmup
from cifar_accel.options.values import parse_duration, parse_sizes
from cifar_accel.plan import Plan
from cifar_accel.records.folder import Opened
from cifar_accel.records.meters import Clock
from cifar_accel.records.state import State
from cifar_accel.records.summary import Config
from cifar_accel.run import Run, check_choices, fit_options, load_splits, set_up
from cifar_accel.step import take_step
from cifar_accel.trial import check_memory, memory_explained

# The sides in pixels that are tried. Others are interpolated.
SIDES = (64, 96, 128)
# Steps of each side are timed for this share of the budget, or these seconds if that is less.
SHARE, SECONDS = 0.01, 3.0
# As many steps at least, and at most.
FEWEST_STEPS, MOST_STEPS = 3, 200
# Untimed steps before: the first compiles and allocates, CUDA graphs are recorded in the next two,
# and workers have read ahead.
UNTIMED_STEPS = 3
# Images over which precisions are compared, and by how much one must be faster to be named.
IMAGES_TO_COMPARE = 64
CLEARLY_FASTER = 1.15
# Images evaluated at once.
EVALUATED = 256
# The options that --budget chooses, and those in which two runs of one plan agree.
PLANNED = {"image_size", "epochs", "warmup_epochs"}
ALIKE = ("model", "dataset", "batch_size", "pipeline")
# Nothing was timed yet.
UNKNOWN = Speed({}, {})
# Seconds for what comes after the last evaluation: weights, plots, the tracker's end.
ENDING = 6.0


@dataclass(frozen=True)
class Start:
    """What a start has beside its options. `splits` are what its steps are timed on."""

    opened: Opened
    ranks: Ranks
    stop: StopRequest
    splits: Splits


# ---- what fits into a budget


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
    which names the shortest time, where it is too short; PeerLost.
    """
    budget = parse_duration(str(args.budget), "--budget")
    check_choices(args)
    args, origin = fit_options(args, origin, opened)
    if args.plan_of:
        of_another = plan_of_another(args) if ranks.is_main else {}
        args, origin = derived(args, origin, ranks.from_main(of_another))
        return with_warmup(args, origin)
    splits = splits or load_splits(args)
    say(f"budget    {args.budget}: timing a few steps")
    # From the beginning, and by a model that is fitted already.
    afresh = Opened(opened.path, derived={"interpolation": args.interpolation})
    best = what_fits(args, origin, Start(afresh, ranks, stop, splits), budget)
    chosen = {"image_size": text_of(best.parts), "epochs": best.epochs}
    return with_warmup(*derived(args, origin, chosen))


def what_fits(
    args: TrainingArguments, origin: dict[str, str], start: Start, budget: float
) -> Fitted:
    """The sizes and epochs that fit best into `budget` seconds since the process began.

    What was timed, and what else would fit, is printed. All ranks enter. Raises BadInput.
    """
    ranks = start.ranks
    dataset, held_out = start.splits
    choices, sides = what_to_try(args, origin)
    epochs = args.epochs if origin["epochs"] == "flag" else 0
    speed = UNKNOWN
    # Most of the time goes into the last size: it is timed before it is chosen.
    while sides:
        with peers_expected():
            seconds = min(SECONDS, SHARE * budget)
            speed, plan = time_sizes(args, origin, start, sides, seconds, speed)
        # What is left, of which the main process's clock is the judge. Held-out images are
        # evaluated each epoch, and the test images once more.
        ending = ENDING
        if held_out is not dataset.test:
            ending += max(speed.evaluations.values()) * len(dataset.test) / len(held_out)
        gone = time.time() - psutil.Process().create_time()
        left = ranks.from_main(budget - gone - ending)
        try:
            best, *others = fit(left, speed, plan.steps_per_epoch, choices, epochs)
        except TooShort as e:
            shortest = math.ceil((e.seconds + gone + ending) / 60)
            raise BadInput(f"--budget {args.budget}: too short; the shortest is {shortest}m") from e
        last, _ = best.parts[-1]
        sides = () if last in speed.steps else (last,)

    if origin["image_size"] != "flag":
        best = lengthened(best, left, speed, plan.steps_per_epoch)
    explain(best, others, speed, left, gone)
    return best


def what_to_try(
    args: TrainingArguments, origin: dict[str, str]
) -> tuple[list[Parts], tuple[int, ...]]:
    """The sizes to choose from, and the sides to time."""
    if origin["image_size"] == "flag":
        return [args.sizes], tuple(side for side, _ in args.sizes)
    # Some models take one size a run, some one size alone.
    growing = sizes_taken(args, (text_of(growing_to(last)) for last in LAST_SIZES))
    sides = sizes_taken(args, SIDES) or [args.input_size]
    # The seconds of other sides are found between and beyond two that were timed.
    if len(sides) > 1 and growing:
        choices = [parse_sizes(text) for text in growing]
    else:
        choices = [one_size(int(side)) for side in sides]
    return choices, tuple(int(side) for side in sides)


def with_warmup(
    args: TrainingArguments, origin: dict[str, str]
) -> tuple[TrainingArguments, dict[str, str]]:
    """The options with a warm-up as long as the epochs ask for. Raises BadInput: a longer one."""
    if origin["warmup_epochs"] == "flag":
        warmup(args, {"epochs"})
        return args, origin
    return derived(args, origin, warmup(replace(args, warmup_epochs=None), set()))


def plan_of_another(args: TrainingArguments) -> dict[str, Any]:
    """Sizes and epochs of the run that --plan-of names. Raises BadInput."""
    folder = home(str(args.plan_of))
    config = read_as(Config, folder / "config.json")
    if config is None or config.options.budget != args.budget:
        raise BadInput(
            f"--plan-of {folder}: has no plan of --budget {args.budget}; in a study this is the "
            "first seed's run, which must have begun"
        )
    for name in ALIKE:
        if getattr(config.options, name) != getattr(args, name):
            raise BadInput(f"--plan-of {folder}: is of another {flag(name)}")
    say(f"budget    {args.budget}: the plan of {folder}")
    return {name: getattr(config.options, name) for name in PLANNED - {"warmup_epochs"}}


def explain(best: Fitted, others: list[Fitted], speed: Speed, left: float, gone: float) -> None:
    """Print what was measured, what was chosen and why, and what else would have fitted."""
    steps = ", ".join(f"{seconds:.3g} s at {side} px" for side, seconds in speed.steps.items())
    evaluations = ", ".join(f"{seconds:.0f}" for seconds in speed.evaluations.values())
    say(f"budget    a step takes {steps}; an evaluation {evaluations} s")
    say(f"budget    {gone:.0f} s are gone, {RESERVE:.0%} of the other {left:.0f} are kept back")
    say("budget    sizes                   epochs  minutes  points lost to size and epochs")
    for choice in (best, *others):
        sizes, minutes = str(text_of(choice.parts)), choice.seconds / 60
        mark = "  <- this" if choice is best else ""
        say(f"budget    {sizes:<24}{choice.epochs:>6}{minutes:>9.1f}{choice.lost:>9.1f}{mark}")


# ---- how long a step takes


def time_sizes(
    args: TrainingArguments,
    origin: dict[str, str],
    start: Start,
    sides: tuple[int, ...],
    seconds: float,
    known: Speed = UNKNOWN,
) -> tuple[Speed, Plan]:
    """Seconds of a step and of an evaluation by side, and the plan of a run at the last side.

    They are added to those that are `known`. Steps of each side are taken for about `seconds`. All
    ranks enter; of their times the longest
    count. Each side's run is set up as a training is, and is forgotten. Raises BadInput as `set_up`
    does, and OutOfMemory.
    """
    ranks = start.ranks
    accelerator = ranks.accelerator
    accumulation = accelerator.gradient_accumulation_steps
    scaler_state = accelerator.scaler.state_dict() if accelerator.scaler else {}
    origin = origin | {"image_size": "flag"}
    steps = dict(known.steps)
    evaluations = dict(known.evaluations)
    for side in sides:
        of_side = replace(args, image_size=side)
        # What it says of itself is said by the run that follows.
        with contextlib.redirect_stdout(io.StringIO()):
            run, state = set_up(of_side, origin, start.opened, ranks, start.stop, start.splits)
        check_memory(run)
        plan = run.plan
        try:
            if not steps:
                _name_a_faster_precision(run, side)
            steps[side] = _seconds_of_a_step(run, state, seconds)
            evaluations[side] = max(ranks.gather(_seconds_of_an_evaluation(run)))
        except (RuntimeError, MemoryError) as e:
            failure = memory_explained(e, run, plan.order.micro_batch_size)
            if failure is e:
                raise
            raise failure from None
        # The training begins as if nothing had been before. Accelerate would unscale the gradients
        # of every optimizer that it has prepared, and dynamo counts what it has compiled.
        del run
        accelerator.free_memory()
        accelerator.gradient_accumulation_steps = accumulation
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(scaler_state)
        if args.compile:
            torch._dynamo.reset()
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    return Speed(steps, evaluations), plan


def with_pixels(splits: Splits, side: tuple[int, int]) -> Splits:
    """Splits of black images in place of none; the system gives no memory to what is only read."""
    dataset, held_out = splits

    def black(split: Split) -> Split:
        return replace(split, images=np.zeros((len(split.labels), 3, *side), np.uint8))

    test = black(dataset.test)
    evaluation = test if held_out is dataset.test else black(held_out)
    return replace(dataset, train=black(dataset.train), test=test), evaluation


def _seconds_of_a_step(run: Run, state: State, seconds: float) -> float:
    """Seconds of an optimizer step, over about `seconds`; its images are made as in training.

    All ranks enter, and take equally many steps.
    """
    run.model.module.train()
    plan = run.plan
    # More steps than are ever taken; rates are those of the first epoch.
    batches = run.data.train.training_batches(plan.order, 0, 10**6, plan.image_size)
    clock = Clock(state)

    def take(count: int) -> float:
        began = time.perf_counter()
        for step in range(count):
            take_step(run, step % plan.total_steps, batches, clock)
        # The host waits here.
        run.sums.values.tolist()
        return max(run.ranks.gather((time.perf_counter() - began) / count))

    with contextlib.closing(batches):
        take(UNTIMED_STEPS)
        about = take(1)
        count = min(MOST_STEPS, max(FEWEST_STEPS, math.ceil(seconds / about)))
        return take(count)


def _name_a_faster_precision(run: Run, side: int) -> None:
    """Say so where fp32 or bf16, which the launcher did not choose, is clearly faster here."""
    chosen = run.ranks.accelerator.mixed_precision
    # A compiled model would be compiled once more.
    if chosen not in ("no", "bf16") or run.model.compiled:
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
    module = run.model.module.train()
    # Accelerate has put its own precision around the forward pass.
    forward = getattr(module, "_original_forward", module.forward)
    weights = [p for p in module.parameters() if p.requires_grad]
    images = min(run.plan.order.micro_batch_size, IMAGES_TO_COMPARE)
    x = torch.zeros(images, 3, side, side, device=device)
    x = x.contiguous(memory_format=run.model.layout)
    # The first makes what the others find made; of these the fastest was disturbed least.
    times = []
    for _ in range(4):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = forward(x)
        gradients = torch.autograd.grad(logits.float().sum(), weights, allow_unused=True)
        # The host waits here.
        torch.stack([g.sum() for g in gradients if g is not None]).tolist()
        times.append(time.perf_counter() - began)
    return min(times[1:])


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
