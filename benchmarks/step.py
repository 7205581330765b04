"""The step: our loop over a bare one, layouts and precisions by family, and the memory of the resident pipeline.

python -m benchmarks.step [DATASET] [--rounds 5] python -m benchmarks.step --formats MODEL ...     #
fills CHANNELS_LAST of cifar_accel/models/create.py
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

MODEL, STEPS = "test_vit", 40


def our_loop(data: Dataset, device: str) -> tuple[Run, Callable[[], float]]:
    """Seconds of `STEPS` steps of this project's loop on a tiny model, counting, seeding and asking included."""
    args = replace(
        recipe_defaults("plain"),
        model=MODEL,
        pretrained=False,
        device=device,
        warmup_epochs=0.0,
        epochs=10_000,
    )
    run, state = our_run(args, data)
    micro_batches = run.data.train.training_batches(run.plan.order, 0, run.plan.total_steps)
    clock = Clock(state)

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            train.agree(run, clock.minutes_up(run.plan.save_minutes))
            train.take_step(run, state.step, micro_batches, clock)
            state.step += 1
        train.collect(run, state)
        return time.perf_counter() - began

    return run, measure


def bare_loop(run: Run) -> Callable[[], float]:
    """The same step by hand: the same batches, model and optimizer, nothing counted."""
    device = run.ranks.device
    classes = len(run.data.train.split.classes)
    model = timm.create_model(MODEL, num_classes=classes, img_size=32)
    shorten_convolutions(model)
    model.to(device, memory_format=run.model.layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, fused=True)
    batches = run.data.train.training_batches(run.plan.order, 0, run.plan.total_steps)
    criterion = SoftTargetCrossEntropy()

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            images, _, targets = next(batches)
            loss = criterion(model(images.contiguous(memory_format=run.model.layout)), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - began

    return measure


def peak_of(side: str, data: Dataset, device: str) -> float:
    """Peak memory in MiB of `STEPS` steps: ours, or a plain loop over the same resident images without augmentation."""
    if side == "ours":
        run, measure = our_loop(data, device)
        measure()
        return peak_memory_mib(run.ranks.device)
    if device == "cpu":
        keep_freed_memory()
    resident, labels = (
        torch.from_numpy(data.train.images).to(device),
        torch.from_numpy(data.train.labels).to(device),
    )
    model = timm.create_model(MODEL, num_classes=len(data.train.classes), img_size=32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, fused=True)
    for _ in range(STEPS):
        chosen = torch.randint(0, len(labels), (256,), device=device)
        x = resident[chosen].float().div_(255).sub_(0.5).div_(0.25)
        torch.nn.functional.cross_entropy(model(x), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak_memory_mib(torch.device(device))


def formats(name: str, device: torch.device, rounds: int) -> list[Row]:
    """Images per second of a training step in each layout and precision, random images, batch 256."""

    def contender(layout: torch.memory_format, bf16: bool) -> Callable[[], float]:
        size = {"img_size": 32} if "vit" in name else {}
        model: torch.nn.Module = timm.create_model(name, num_classes=100, **size).train()
        shorten_convolutions(model)
        model.to(device, memory_format=layout)
        optimizer = torch.optim.AdamW(model.parameters(), 5e-4, fused=True)
        x = torch.randn(256, 3, 32, 32, device=device).contiguous(memory_format=layout)
        y = torch.rand(256, 100, device=device).softmax(1)
        criterion = SoftTargetCrossEntropy()

        def measure() -> float:
            began = time.perf_counter()
            for _ in range(20 if device.type == "cuda" else 2):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = model(x)
                loss = criterion(logits.float(), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            loss.item()
            return (20 if device.type == "cuda" else 2) * 256 / (time.perf_counter() - began)

        return measure

    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    contenders = {
        f"{n}, {p}": contender(f, p == "bf16") for n, f in layouts.items() for p in ("fp32", "bf16")
    }
    in_turns(contenders, 1)
    seen = in_turns(contenders, rounds)
    return [
        Row(f"{name} on {device.type}: {kind}", "img/s", values) for kind, values in seen.items()
    ]


def measure(data: Dataset, dataset: str, data_dir: str, device: str, rounds: int) -> list[Row]:
    """The rows of loop and memory."""
    run, ours = our_loop(data, device)
    bare = bare_loop(run)
    in_turns({"ours": ours, "bare": bare}, 1)
    seen = in_turns({"ours": ours, "bare": bare}, 3 * rounds)
    rows = [
        Row(f"{MODEL} on {device}: {k} loop", "ms/step", [v / STEPS * 1e3 for v in vs])
        for k, vs in seen.items()
    ]
    rows.append(
        goal(
            f"{MODEL} on {device}: our loop over the bare one",
            ratios(seen["ours"], seen["bare"]),
            1.03,
            1.0,
            most=True,
        )
    )
    peaks: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(rounds):  # a process has one peak: each value is of a new one
        for side, values in peaks.items():
            child = Contender(
                "benchmarks.step",
                dataset,
                "--data-dir",
                data_dir,
                "--device",
                device,
                "--peak",
                side,
            )
            values.append(child()["peak_mib"])
            child.close()
    rows += [
        Row(f"peak memory on {device}: {side}", "MiB", values) for side, values in peaks.items()
    ]
    rows.append(
        goal(
            f"peak memory on {device}: ours over plain",
            ratios(peaks["ours"], peaks["plain"]),
            1.3,
            1.1,
            most=True,
        )
    )
    return rows


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--formats", nargs="+", metavar="MODEL")
    options.add_argument("--peak", choices=["ours", "plain"], help=argparse.SUPPRESS)
    given = options.parse_args()
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")
    if given.formats:
        rows = [
            row
            for name in given.formats
            for row in formats(name, torch.device(given.device), given.rounds)
        ]
        return show(rows, None, "layouts and precisions")
    data = images(given.dataset, given.data_dir)
    if given.peak:
        return serve(lambda: {"peak_mib": peak_of(given.peak, data, given.device)})
    show(measure(data, given.dataset, given.data_dir, given.device, given.rounds), None, "the step")


if __name__ == "__main__":
    main()
