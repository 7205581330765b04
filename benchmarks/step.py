"""The step: our loop over a bare one, the resident pipeline's memory, and layouts by family.

    python -m benchmarks.step [DATASET] [--rounds 5]
    python -m benchmarks.step --formats MODEL ...

`--formats` times a step in each layout and precision: it is what CHANNELS_LAST in
cifar_accel/models/create.py is filled by.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace

import timm
import torch
from timm.loss import SoftTargetCrossEntropy

from benchmarks.measure import (
    Contender,
    Row,
    goal,
    images,
    in_turns,
    our_run,
    parser,
    ratios,
    serve,
    show,
)
from cifar_accel import train
from cifar_accel.data.datasets import Dataset
from cifar_accel.machine.speed import keep_freed_memory, peak_memory_mib
from cifar_accel.models.surgery import shorten_convolutions
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.records.meters import Clock
from cifar_accel.run import Run

# A model so small that what the loop itself does can be seen.
MODEL = "test_vit"
# Steps in one measurement.
STEPS = 40
# Images in a step; of the recipe `plain` too.
BATCH = 256

# ---- the loop


def our_loop(data: Dataset, device: str, **options: object) -> tuple[Run, Callable[[], float]]:
    """A run of ours under more `options`, and a measurement of it: seconds of `STEPS` steps.

    With all that the trainer does in a step: counting, seeding, and asking whether to stop.
    """
    args = replace(
        recipe_defaults("plain"),
        model=MODEL,
        pretrained=False,
        device=device,
        warmup_epochs=0.0,
        # More than any measurement takes.
        epochs=10_000,
    )
    args = replace(args, **options)
    run, state = our_run(args, data)
    micro_batches = run.data.train.training_batches(run.plan.order, 0, run.plan.total_steps)
    clock = Clock(state)

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            train.agree(run, clock.minutes_up(run.plan.save_minutes))
            train.take_step(run, state.step, micro_batches, clock)
            state.step += 1
        # The host waits here.
        train.collect(run, state)
        return time.perf_counter() - began

    return run, measure


def bare_loop(run: Run) -> Callable[[], float]:
    """The same step by hand: the same batches, model and optimizer, nothing counted."""
    device = run.ranks.device
    layout = run.model.layout
    classes = len(run.data.train.split.classes)
    model = timm.create_model(MODEL, num_classes=classes, img_size=32)
    shorten_convolutions(model)
    model.to(device, memory_format=layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, fused=True)
    batches = run.data.train.training_batches(run.plan.order, 0, run.plan.total_steps)
    criterion = SoftTargetCrossEntropy()

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            images, _, targets = next(batches)
            loss = criterion(model(images.contiguous(memory_format=layout)), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # The host waits here.
        loss.item()
        return time.perf_counter() - began

    return measure


# ---- memory


def peak_of(side: str, data: Dataset, device: str) -> float:
    """Peak memory in MiB of `STEPS` steps of this process: `ours`, or a plain loop's."""
    if side == "ours":
        run, measure = our_loop(data, device)
        measure()
        return peak_memory_mib(run.ranks.device)

    # The plain loop: the same images on the device, without augmentation.
    if device == "cpu":
        keep_freed_memory()
    resident = torch.from_numpy(data.train.images).to(device)
    labels = torch.from_numpy(data.train.labels).to(device)
    model = timm.create_model(MODEL, num_classes=len(data.train.classes), img_size=32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, fused=True)
    for _ in range(STEPS):
        chosen = torch.randint(0, len(labels), (BATCH,), device=device)
        x = resident[chosen].float().div_(255).sub_(0.5).div_(0.25)
        torch.nn.functional.cross_entropy(model(x), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak_memory_mib(torch.device(device))


# ---- layouts and precisions


def training_step(
    name: str, device: torch.device, layout: torch.memory_format, bf16: bool, batch: int = BATCH
) -> Callable[[], float]:
    """A measurement of model `name`: images per second of training steps on random images."""
    # The model as the trainer makes it.
    size = {"img_size": 32} if "vit" in name else {}
    model: torch.nn.Module = timm.create_model(name, num_classes=100, **size).train()
    shorten_convolutions(model)
    model.to(device, memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, fused=True)
    x = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=layout)
    y = torch.rand(batch, 100, device=device).softmax(1)
    criterion = SoftTargetCrossEntropy()
    steps = 20 if device.type == "cuda" else 2

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(x)
            loss = criterion(logits.float(), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        # The host waits here.
        loss.item()
        return steps * batch / (time.perf_counter() - began)

    return measure


def formats(name: str, device: torch.device, rounds: int) -> list[Row]:
    """Images per second of a training step of model `name` in each layout and precision."""
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    contenders = {}
    for layout_name, layout in layouts.items():
        for precision in ("fp32", "bf16"):
            contenders[f"{layout_name}, {precision}"] = training_step(
                name, device, layout, bf16=precision == "bf16"
            )
    # The first round is not measured.
    in_turns(contenders, 1)
    seen = in_turns(contenders, rounds)
    label = f"{name} on {device.type}"
    return [Row(f"{label}: {kind}", "img/s", values) for kind, values in seen.items()]


# ---- the table


def measure(data: Dataset, dataset: str, data_dir: str, device: str, rounds: int) -> list[Row]:
    """The rows of loop and memory; `data` is what `dataset` and `data_dir` name."""
    # The loops; the first round is not measured.
    run, ours = our_loop(data, device)
    contenders = {"ours": ours, "bare": bare_loop(run)}
    in_turns(contenders, 1)
    seen = in_turns(contenders, 3 * rounds)

    # A process has one peak of memory, so each value is of a new one.
    peaks: dict[str, list[float]] = {"ours": [], "plain": []}
    words = [dataset, "--data-dir", data_dir, "--device", device, "--peak"]
    for _ in range(rounds):
        for side, values in peaks.items():
            child = Contender("benchmarks.step", *words, side)
            values.append(child()["peak_mib"])
            child.close()

    rows = []
    label = f"{MODEL} on {device}"
    for side, values in seen.items():
        milliseconds = [seconds / STEPS * 1e3 for seconds in values]
        rows.append(Row(f"{label}: {side} loop", "ms/step", milliseconds))
    # How much the trainer's bookkeeping costs.
    over = ratios(seen["ours"], seen["bare"])
    rows.append(goal(f"{label}: our loop over the bare one", over, 1.03, 1.0, most=True))
    label = f"peak memory on {device}"
    for side, values in peaks.items():
        rows.append(Row(f"{label}: {side}", "MiB", values))
    # How much the pipeline holds beyond the images.
    over = ratios(peaks["ours"], peaks["plain"])
    rows.append(goal(f"{label}: ours over plain", over, 1.3, 1.1, most=True))
    return rows


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--formats", nargs="+", metavar="MODEL")
    options.add_argument("--peak", choices=["ours", "plain"], help=argparse.SUPPRESS)
    given = options.parse_args()
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")

    if given.formats:
        rows = []
        for name in given.formats:
            rows += formats(name, torch.device(given.device), given.rounds)
        show(rows, None, "layouts and precisions")
        return

    data = images(given.dataset, given.data_dir)
    # A child that measures its own peak of memory.
    if given.peak:
        serve(lambda: {"peak_mib": peak_of(given.peak, data, given.device)})
        return
    rows = measure(data, given.dataset, given.data_dir, given.device, given.rounds)
    show(rows, None, "the step")


if __name__ == "__main__":
    main()
