"""Images per second of the device pipeline against timm's create_loader, in turns, in one process.

    python -m benchmarks.pipeline DATASET [--batches 100] [--rounds 5]

DATASET is anything that --dataset takes. Both sides do the same work: random crop of the image padded by 4 pixels,
left-right flip, normalise, to a float32 batch of 256 on --device. Prints medians over the rounds and their range.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import timm
import torch
from PIL import Image
from torchvision import transforms

from cifar_accel.config import IMAGENET_MEAN, IMAGENET_STD, recipe_defaults
from cifar_accel.data.cache import load_dataset
from cifar_accel.data.order import Order
from cifar_accel.data.pipelines import Pipeline
from cifar_accel.data.sources import Split
from cifar_accel.run_folder import describe_config

BATCH = 256


class Pictures(torch.utils.data.Dataset):
    """A split as timm's loader wants it: PIL images and integer labels."""

    def __init__(self, split: Split):
        self.split, self.transform = split, None

    def __len__(self) -> int:
        """Images."""
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """The transformed image and its label."""
        image = Image.fromarray(self.split.images[index].transpose(1, 2, 0))
        return self.transform(image), int(self.split.labels[index])


def timm_loader(split: Split, workers: int, device: torch.device) -> Iterator[object]:
    """timm's create_loader with its prefetcher where there is CUDA, and its transform replaced by crop and flip."""
    cuda = device.type == "cuda"
    loader = timm.data.create_loader(
        Pictures(split), (3, 32, 32), BATCH, is_training=True, num_workers=workers, use_prefetcher=cuda,
        mean=IMAGENET_MEAN, std=IMAGENET_STD, device=device, persistent_workers=workers > 0, pin_memory=cuda,
    )  # fmt: skip
    last = (
        [timm.data.transforms.ToNumpy()]
        if cuda
        else [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    crop = transforms.RandomCrop(32, padding=4, padding_mode="reflect")
    loader.dataset.transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *last])
    while True:
        yield from loader


def device_pipeline(split: Split, device: torch.device) -> Iterator[object]:
    """This project's resident pipeline."""
    args = recipe_defaults("plain")
    pipeline = Pipeline(replace(args, smoothing=0.0), split, device, IMAGENET_MEAN, IMAGENET_STD)
    return pipeline.training_batches(Order(0, len(split), BATCH), 0, 10**9)


def images_per_s(stream: Iterator[object], batches: int, wait: Callable[[], None]) -> float:
    """Throughput of the next `batches` batches, the device being done at both ends."""
    wait()
    started = time.perf_counter()
    for _ in range(batches):
        next(stream)
    wait()
    return batches * BATCH / (time.perf_counter() - started)


def main() -> None:
    """Measure and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--data-dir", default="~/.cache/cifar_accel")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = torch.device(given.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    split = load_dataset(given.dataset, given.data_dir, 32).train
    streams = {f"timm, {w} workers": timm_loader(split, w, device) for w in (0, 2, 4)}
    streams["device pipeline"] = device_pipeline(split, device)
    for stream in streams.values():
        images_per_s(stream, 10, wait)
    seen: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(given.rounds):
        for name, stream in streams.items():
            seen[name].append(images_per_s(stream, given.batches, wait))
    base = {w: np.array(seen[f"timm, {w} workers"]) for w in (0, 2, 4)}
    ours = np.array(seen["device pipeline"])
    print(f"\n{'crop, flip, normalise':<20}{'img/s (median)':>16}{'range':>22}")
    for name, values in seen.items():
        print(f"{name:<20}{statistics.median(values):>16,.0f}{f'{min(values):,.0f} to {max(values):,.0f}':>22}")
    for workers, theirs in base.items():
        print(f"ratio to timm with {workers} workers: {np.median(ours / theirs):.1f} (round by round, median)")
    about = describe_config(recipe_defaults("plain"), {}, {})
    print(json.dumps({"images_per_s": seen, "versions": about["versions"], "hardware": about["hardware"]}))


if __name__ == "__main__":
    main()
