"""How long steps and evaluations take on this machine, found by taking a few; and what fits."""

import contextlib
import io
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from cifar_accel.budget import (
    BATCH_NORM_GROWTH,
    GROWTH,
    LAST_SIZES,
    RESERVE,
    Fitted,
    Parts,
    Speed,
    TooShort,
    fit_choices,
    growing_to,
    lengthened,
    one_size,
    text_of,
)
from cifar_accel.console import in_time, say
from cifar_accel.data.batches import Batch
from cifar_accel.data.datasets import Split
from cifar_accel.data.splits import Splits
from cifar_accel.errors import BadInput, DoesNotFit, OutOfMemory
from cifar_accel.files import home, read_as
from cifar_accel.machine.memory import free_memory, is_out_of_memory
from cifar_accel.machine.processes import Ranks, peers_expected
from cifar_accel.machine.signals import StopRequest
from cifar_accel.machine.speed import peak_memory_mib
from cifar_accel.models.create import check_model
from cifar_accel.models.finetune import LONG_RUN, is_of_batch_norm, regularised, sizes_taken
from cifar_accel.options.options import TrainingArguments, flag
from cifar_accel.options.recipes import PLANNED
from cifar_accel.options.resolve import warmup, with_derived
from cifar_accel.options.values import parse_duration
from cifar_accel.records.folder import Opened
from cifar_accel.records.meters import Clock
from cifar_accel.records.state import State
from cifar_accel.records.summary import Config
from cifar_accel.run import Run, check_choices, fit_options, load_splits, set_up
from cifar_accel.step import take_step
from cifar_accel.trial import check_memory, memory_explained

# The sides in pixels that are timed at first. Others follow from these.
FIRST_SIDES = (64, 96, 128)
# Steps of each side are timed for this share of the budget, or these seconds if that is less.
SHARE, SECONDS = 0.01, 3.0
# A side beyond the first is not timed where that would take more than this share of the budget. Of
# a slow model it takes as long as so many steps.
MOST_SHARE = 0.05
AS_LONG_AS = 4
# As many steps at least, and at most.
FEWEST_STEPS, MOST_STEPS = 3, 200
# Untimed steps before: the first compiles and allocates, CUDA graphs are recorded in the next two,
# and workers have read ahead. Where one takes long, it is the only one.
UNTIMED_STEPS = 3
# Images over which precisions are compared, and by how much one must be faster to be named.
IMAGES_TO_COMPARE = 64
CLEARLY_FASTER = 1.15
# The options in which two runs of one plan agree, beside those of the plan that are given.
ALIKE = {"model", "dataset", "pipeline", "batch_size"}
# And those that say how many images there are.
ALIKE_IMAGES = {"limit_train", "limit_test", "validation_fraction"}
# Nothing was timed yet.
UNKNOWN = Speed({}, {}, {})
# Seconds for what comes after the last evaluation: weights, plots, the tracker's end.
ENDING = 6.0


@dataclass(frozen=True)
class Start:
    """What a start has beside its options. `splits` are what its steps are timed on."""

    path: Path
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
) -> tuple[TrainingArguments, dict[str, str], Splits | None]:
    """The options with sizes and epochs that fit into --budget, and where each comes from.

    Steps are timed on `splits` (unset: what --dataset names), which are given back. All ranks
    enter. Raises BadInput, which names the shortest time, where it is too short; PeerLost.
    """
    # What does not exist is told before anything is decoded.
    budget = parse_duration(str(args.budget), "--budget")
    check_choices(args)
    check_model(args, say)
    args, origin = fit_options(args, origin, opened)
    if args.plan_of:
        of_another = plan_of_another(args, origin) if ranks.is_main else {}
        chosen = ranks.from_main(of_another)
    else:
        splits = splits or load_splits(args)
        say(f"budget    {args.budget}: timing a few steps")
        best = what_fits(args, origin, Start(opened.path, ranks, stop, splits), budget)
        chosen = {"image_size": text_of(best.parts), "epochs": best.epochs}
    args, origin = with_warmup(*with_derived(args, origin, chosen))
    # Before it was chosen, `fit_to_model` did not know of a long run.
    if args.epochs > LONG_RUN:
        args, origin = regularised(args, origin)
    return args, origin, splits


def what_fits(
    args: TrainingArguments, origin: dict[str, str], start: Start, budget: float
) -> Fitted:
    """The sizes and epochs that fit best into `budget` seconds since the process began.

    What was timed, and what else would fit, is printed. All ranks enter. Raises BadInput.
    """
    dataset, held_out = start.splits
    steps_per_epoch = len(dataset.train) // args.batch_size
    epochs = args.epochs if origin["epochs"] == "flag" else 0
    choices, sides = what_to_try(args, origin)
    speed = UNKNOWN
    tried: set[int] = set()
    # What is chosen has been timed, unless that would take too long.
    while sides:
        for side in sides:
            # The steps of a slow model could take all of the time that there is. Where a
            # side did not fit into memory, larger ones are no choice any more.
            is_quick = not speed.steps or AS_LONG_AS * speed.step(side) < MOST_SHARE * budget
            if is_quick and any(side in dict(parts) for parts in choices):
                seconds = min(SECONDS, SHARE * budget)
                speed, choices = time_one_more(args, origin, start, side, seconds, speed, choices)
        tried |= set(sides)
        choices = with_room(choices, start.ranks, max(speed.steps))

        # What is left, of which the main process's clock is the judge. Held-out images are
        # evaluated each epoch, and the test images once more. A compiled model is compiled for each
        # size, and to be evaluated.
        ending = ENDING
        if held_out is not dataset.test:
            ending += max(speed.evaluations.values()) * len(dataset.test) / len(held_out)
        if args.compile:
            ending += (len(GROWTH) + 1) * max(speed.starts.values())
        gone = time.time() - psutil.Process().create_time()
        left = start.ranks.from_main(budget - gone - ending)
        try:
            best, *others = fit_choices(left, speed, steps_per_epoch, choices, epochs)
        except TooShort as e:
            shortest = math.ceil((e.seconds + gone + ending) / 60)
            raise BadInput(f"--budget {args.budget}: too short; the shortest is {shortest}m") from e
        sides = tuple(side for side, _ in best.parts if side not in tried)

    if origin["image_size"] != "flag":
        best = lengthened(best, left, speed, steps_per_epoch)
    explain(best, others, speed, gone + ending)
    return best


def time_one_more(
    args: TrainingArguments,
    origin: dict[str, str],
    start: Start,
    side: int,
    seconds: float,
    speed: Speed,
    choices: list[Parts],
) -> tuple[Speed, list[Parts]]:
    """`speed` with that of `side`; where that does not fit into memory, the smaller `choices`.

    All ranks enter. Raises DoesNotFit or OutOfMemory where there is none.
    """
    try:
        with peers_expected():
            return time_side(args, origin, start, side, seconds, speed), choices
    except (DoesNotFit, OutOfMemory):
        smaller = [parts for parts in choices if parts[-1][0] < side]
        if not smaller:
            raise
        say(f"budget    {side} px do not fit into memory")
        return speed, smaller


def with_room(choices: list[Parts], ranks: Ranks, largest: int) -> list[Parts]:
    """Those of the `choices` that a host has room for, as far as `largest` pixels tell.

    A host kills without a word what it has no room for. All ranks enter; they share it.
    """
    if ranks.device.type != "cpu":
        return choices
    # What a step takes goes with its pixels.
    taken = peak_memory_mib(ranks.device) * 2**20
    room = min(ranks.gather(1 + free_memory(ranks.device) / ranks.world / taken))
    return [parts for parts in choices if parts[-1][0] ** 2 <= room * largest**2] or choices


def what_to_try(
    args: TrainingArguments, origin: dict[str, str]
) -> tuple[list[Parts], tuple[int, ...]]:
    """The sizes to choose from, and the sides to time first."""
    if origin["image_size"] == "flag":
        return [args.sizes], tuple(side for side, _ in args.sizes)
    # Some models take one size a run, some a few sides, some one alone.
    choices = []
    growth = BATCH_NORM_GROWTH if is_of_batch_norm(args) else GROWTH
    for last in LAST_SIZES:
        ways = (growing_to(last, growth), one_size(last))
        choices += [way for way in ways if sizes_taken(args, [text_of(way)])][:1]
    sides = [side for side in FIRST_SIDES if sizes_taken(args, [side])]
    return choices or [args.sizes], tuple(sides or [args.input_size])


def with_warmup(
    args: TrainingArguments, origin: dict[str, str]
) -> tuple[TrainingArguments, dict[str, str]]:
    """The options with a warm-up as long as the epochs ask for. Raises BadInput: a longer one."""
    if origin["warmup_epochs"] == "flag":
        warmup(args, {"epochs"})
        return args, origin
    return with_derived(args, origin, warmup(replace(args, warmup_epochs=None), set()))


def plan_of_another(args: TrainingArguments, origin: dict[str, str]) -> dict[str, Any]:
    """Sizes and epochs of the run that --plan-of names. Raises BadInput."""
    folder = home(str(args.plan_of))
    config = read_as(Config, folder / "config.json")
    if config is None or config.options.budget != args.budget:
        raise BadInput(
            f"--plan-of {folder}: has no plan of --budget {args.budget}; in a study this is the "
            "first seed's run, which must have begun"
        )
    planned = PLANNED - {"warmup_epochs"}
    given = {name for name in planned if origin[name] == "flag"}
    for name in sorted(ALIKE | ALIKE_IMAGES | given):
        if getattr(config.options, name) != getattr(args, name):
            raise BadInput(f"--plan-of {folder}: is of another {flag(name)}")
    say(f"budget    {args.budget}: the plan of {folder}")
    return {name: getattr(config.options, name) for name in planned}


def explain(best: Fitted, others: list[Fitted], speed: Speed, spent: float) -> None:
    """Print what was measured, what was chosen and why, and what else would have fitted."""
    evaluation = ", ".join(in_time(seconds) for seconds in speed.evaluations.values())
    say(f"budget    a step takes {speed.in_words()}; an evaluation {evaluation}")
    say(f"budget    start and end take {in_time(spent)}; {RESERVE:.0%} of the rest are kept back")
    say("budget    sizes                   epochs  minutes  points lost, estimated")
    for choice in (best, *others):
        sizes, minutes = str(text_of(choice.parts)), choice.seconds / 60
        mark = "  <- this" if choice is best else ""
        say(f"budget    {sizes:<24}{choice.epochs:>6}{minutes:>9.1f}{choice.lost:>9.1f}{mark}")


# ---- how long a step takes


def time_side(
    args: TrainingArguments,
    origin: dict[str, str],
    start: Start,
    side: int,
    seconds: float,
    known: Speed = UNKNOWN,
) -> Speed:
    """Seconds of a step and of an evaluation at `side`, beside those that are `known`.

    Steps are taken for about `seconds`. All ranks enter; of their times the longest count. The run
    is set up as a training is, and is forgotten. Raises BadInput as `set_up` does, DoesNotFit and
    OutOfMemory.
    """
    ranks = start.ranks
    accelerator = ranks.accelerator
    scaler_state = accelerator.scaler.state_dict() if accelerator.scaler else {}
    # From the beginning, and by a model that is fitted already.
    of_side = replace(args, image_size=side)
    origin = origin | {"image_size": "flag"}
    afresh = Opened(start.path, derived={"interpolation": args.interpolation})
    # What it says of itself is said by the run that follows.
    with contextlib.redirect_stdout(io.StringIO()):
        run, state = set_up(of_side, origin, afresh, ranks, start.stop, start.splits)
    try:
        check_memory(run)
        first, step = _seconds_of_a_step(run, state, seconds)
        evaluation = max(ranks.gather(_seconds_of_an_evaluation(run)))
        if not known.steps and step < seconds:
            _name_a_faster_precision(run, side)
    except (RuntimeError, MemoryError) as e:
        failure = memory_explained(e, run, run.plan.order.micro_batch_size)
        if failure is e:
            raise
        raise failure from None
    finally:
        # The training begins as if nothing had been before. Accelerate would unscale the gradients
        # of every optimizer that it has prepared, and dynamo counts what it has compiled.
        del run
        accelerator.free_memory()
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(scaler_state)
        if args.compile:
            torch._dynamo.reset()
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)
    return Speed(
        known.steps | {side: step},
        known.evaluations | {side: evaluation},
        known.starts | {side: first},
    )


def with_pixels(splits: Splits, side: tuple[int, int]) -> Splits:
    """Splits of black images in place of none; the system gives no memory to what is only read."""
    dataset, held_out = splits

    def black(split: Split) -> Split:
        return replace(split, images=np.zeros((len(split.labels), 3, *side), np.uint8))

    test = black(dataset.test)
    evaluation = test if held_out is dataset.test else black(held_out)
    return replace(dataset, train=black(dataset.train), test=test), evaluation


def _seconds_of_a_step(run: Run, state: State, seconds: float) -> tuple[float, float]:
    """Seconds of the first optimizer step, and of a later one, over about `seconds`.

    Images are made as in training. All ranks enter, and take equally many steps.
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
        first = take(1)
        if first > seconds and not run.model.compiled:
            return first, take(1)
        take(UNTIMED_STEPS - 1)
        about = take(1)
        return first, take(min(MOST_STEPS, max(FEWEST_STEPS, math.ceil(seconds / about))))


def _name_a_faster_precision(run: Run, side: int) -> None:
    """Say so where fp32 or bf16, which the launcher did not choose, is clearly faster here."""
    chosen = run.ranks.accelerator.mixed_precision
    # A compiled model would be compiled once more.
    if chosen not in ("no", "bf16") or run.model.compiled:
        return
    other = "bf16" if chosen == "no" else "no"
    try:
        factor = _seconds_of_passes(run, side, chosen) / _seconds_of_passes(run, side, other)
    # fp32 takes more memory, which the run does not need.
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        return
    if factor > CLEARLY_FASTER:
        name = other.replace("no", "fp32")
        say(
            f"note      {name} is {factor:.1f} times as fast here as the launcher's choice; start "
            f"with ACCELERATE_MIXED_PRECISION={other}"
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
    size = min(run.plan.evaluation_batch_size, len(pipeline.split))
    model = run.model.evaluated.eval()
    batches = pipeline.evaluation_batches(size, run.ranks.world, run.ranks.rank)

    def look_at(batch: Batch) -> None:
        # The host waits here.
        model(batch.images.contiguous(memory_format=run.model.layout)).sum().item()

    with contextlib.closing(batches), torch.no_grad(), run.ranks.accelerator.autocast():
        # The first makes what the others find made; of few images there is one batch alone.
        first = next(batches)
        look_at(first)
        times = []
        for _ in range(2):
            began = time.perf_counter()
            batch = next(batches, first)
            look_at(batch)
            times.append((time.perf_counter() - began) / len(batch.labels))
    # The faster one was disturbed less.
    return min(times) * len(pipeline.split) / run.ranks.world
