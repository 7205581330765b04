"""Using a model: seconds of predict on many files, and what a run's end costs with wandb.

    python -m benchmarks.use [--repeats 5]

`predict` is a process of its own: Python's start, torch and the model count. The end of a run is
that of 10,000 images of 100 classes, offline, against the same end without what the model says.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from cifar_accel.models.create import build_model
from cifar_accel.models.weights import save_model
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.records.predictions import of_outputs
from cifar_accel.records.trackers import TrackedRun, start_tracker
from cifar_accel.use.details import findings

FILES = 1000
IMAGES, CLASSES = 10_000, 100


def predict_seconds(folder: Path) -> float:
    """Seconds of `predict` on `FILES` files in `folder`/images with the model in `folder`/model."""
    words = [
        sys.executable,
        "-m",
        "cifar_accel.cli",
        "predict",
        folder / "model",
        folder / "images",
    ]
    began = time.perf_counter()
    done = subprocess.run([*words, "--json"], capture_output=True, check=True)
    seconds = time.perf_counter() - began
    assert len(json.loads(done.stdout)) == FILES
    return seconds


def make_folder(folder: Path) -> None:
    """A model and 32x32 PNG files."""
    args = replace(recipe_defaults("digits"), model="test_nfnet", pretrained=False)
    save_model(build_model(args, CLASSES, str), folder / "model", args, names())
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(FILES):
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:04}.png")


def names() -> list[str]:
    """Names as long as those of CIFAR-100 are."""
    return [f"class_name_{c}" for c in range(CLASSES)]


def end_of_run(folder: Path, side: int, shows: bool) -> tuple[float, float]:
    """Seconds and MB of the end of a run on images of side x side, with its objects or not."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, IMAGES)
    logits = rng.normal(0, 2, (IMAGES, CLASSES)).astype(np.float16)
    logits[np.arange(IMAGES), labels] += 4
    said = {"logits": logits, "first_five": np.argsort(-logits, 1)[:, :5]}
    predictions = of_outputs(labels, names(), said, "x", np.arange(IMAGES))
    images = rng.integers(0, 256, (IMAGES if side < 64 else 64, 3, side, side), np.uint8)
    images = images[np.arange(IMAGES) % len(images)] if side < 64 else _Repeated(images)
    run = TrackedRun("project", "name", None, "train", {}, folder, None)
    tracker = start_tracker("wandb", str, run)
    tracker.log({"step": 1, "epoch": 1, "train/loss": 1.0})
    began = time.perf_counter()
    if shows:
        tracker.show(1, partial(findings, predictions, images))
    tracker.finish({"status": "finished", "accuracy": 0.5}, 0)
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return seconds, size / 1e6


class _Repeated:
    """Few images in the place of many."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __getitem__(self, place: int) -> np.ndarray:
        return self.images[place % len(self.images)]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--end", nargs=2, metavar=("SIDE", "SHOWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["WANDB_MODE"] = "offline"
    with tempfile.TemporaryDirectory() as scratch:
        if args.end:
            print(json.dumps(end_of_run(Path(scratch), int(args.end[0]), args.end[1] == "1")))
            return
        make_folder(Path(scratch))
        seconds = [predict_seconds(Path(scratch)) for _ in range(args.repeats)]
    print("| | median | range | n |\n|---|---|---|---|")
    print(
        f"| predict, {FILES:,} files of 32x32, test_nfnet, start included | {_row(seconds, 's')} |"
    )
    for side in (32, 512):
        # Each in a process of its own, in turns.
        ends = {shows: [] for shows in "01"}
        for _ in range(args.repeats):
            for shows, found in ends.items():
                words = [sys.executable, "-m", "benchmarks.use", "--end", str(side), shows]
                out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
                found.append(json.loads(out.splitlines()[-1]))
        pairs = list(zip(ends["1"], ends["0"], strict=True))
        more = [with_it[0] - without[0] for with_it, without in pairs]
        size = [with_it[1] - without[1] for with_it, without in pairs]
        print(f"| objects at the end of a run, images of {side}x{side} | {_row(more, 's')} |")
        print(f"| ... their size | {_row(size, 'MB')} |")


def _row(values: list[float], unit: str) -> str:
    return f"{median(values):.2f} {unit} | {min(values):.2f} to {max(values):.2f} | {len(values)}"


if __name__ == "__main__":
    main()
