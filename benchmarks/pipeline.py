"""Images per second of the device pipeline against timm's create_loader, in turns, in one process.

    python -m benchmarks.pipeline [DATASET] [--policy report|plain] [--rounds 5]

Both sides do the same work to a float32 batch of 256 on --device. `report`: random resized crop,
both flips, rand-m15-n2, normalise, Mixup. `plain`: crop of the image padded by 4 pixels, left-right
flip, normalise.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import timm
import torch
from PIL import Image
from torchvision import transforms

from benchmarks.measure import Row, goal, images, in_turns, parser, ratios, show
from cifar_accel.data.batches import Pipeline
from cifar_accel.data.datasets import Split
from cifar_accel.data.order import Order
from cifar_accel.options.options import IMAGENET_MEAN, IMAGENET_STD
from cifar_accel.options.recipes import recipe_defaults

BATCH = 256

# Worker processes that timm's loader is measured with.
WORKERS = (0, 2, 4)

# By policy and device, the ratio to timm's best that must be reached and that is aimed at.
GOALS = {("report", "cpu"): (3, 5), ("plain", "cpu"): (8, 15)}

# Batches of one measurement: of timm, and of the device pipeline by device. About a second each.
TIMM_BATCHES = 24
DEVICE_BATCHES = {"cpu": 192, "cuda": 2048}

# Batches taken before each measurement: what workers made while the others were measured.
WARM_UP_BATCHES = 8


class Pictures(torch.utils.data.Dataset):
    """A split as timm's loader wants it: PIL images and integer labels."""

    def __init__(self, split: Split):
        self.split = split
        self.transform = None

    def __len__(self) -> int:
        """Images."""
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """The transformed image and its label."""
        image = Image.fromarray(self.split.images[index].transpose(1, 2, 0))
        return self.transform(image), int(self.split.labels[index])


def timm_loader(split: Split, policy: str, workers: int, device: torch.device) -> Iterator[object]:
    """Batches of timm's create_loader, without end; its prefetcher is used where there is CUDA."""
    cuda = device.type == "cuda"
    loader = timm.data.create_loader(
        Pictures(split),
        (3, 32, 32),
        BATCH,
        is_training=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=cuda,
        use_prefetcher=cuda,
        device=device,
        hflip=0.5,
        vflip=0.5,
        auto_augment="rand-m15-n2",
        color_jitter=0.0,
        interpolation="bilinear",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    if policy == "plain":
        loader.dataset.transform = plain_transform(cuda)
    mixing = timm.data.Mixup(0.8, prob=0.7, label_smoothing=0.1, num_classes=len(split.classes))
    while True:
        for x, y in loader:
            yield mixing(x, y) if policy == "report" else (x, y)


def plain_transform(prefetcher: bool) -> transforms.Compose:
    """torchvision's padded crop and flip; timm's prefetcher normalises by itself."""
    moves = [
        transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
    ]
    if prefetcher:
        return transforms.Compose([*moves, timm.data.transforms.ToNumpy()])
    normalise = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return transforms.Compose([*moves, transforms.ToTensor(), normalise])


def device_pipeline(split: Split, policy: str, device: torch.device) -> Iterator[object]:
    """Batches of this project's device pipeline, without end."""
    args = replace(recipe_defaults(policy), smoothing=0.1)
    pipeline = Pipeline(args, split, device, IMAGENET_MEAN, IMAGENET_STD)
    return pipeline.training_batches(Order(0, len(split), BATCH), 0, 10**9)


def images_per_s(
    stream: Iterator[object], warm_up: int, batches: int, device: torch.device
) -> float:
    """Throughput of the next `batches` batches, the device being done at both ends."""
    for _ in range(warm_up):
        next(stream)
    wait_for(device)
    started = time.perf_counter()
    for _ in range(batches):
        next(stream)
    wait_for(device)
    return batches * BATCH / (time.perf_counter() - started)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    split: Split, policy: str, device: torch.device, rounds: int, share: float = 1.0
) -> list[Row]:
    """The rows of one policy; a `share` below 1 takes that much of the batches, for a rehearsal."""

    def rate_of(stream: Iterator[object], batches: int) -> Callable[[], float]:
        warm_up = math.ceil(share * WARM_UP_BATCHES)
        return partial(images_per_s, stream, warm_up, math.ceil(share * batches), device)

    # Each contender is a stream of batches; a measurement takes the next ones from it.
    contenders = {}
    for workers in WORKERS:
        stream = timm_loader(split, policy, workers, device)
        contenders[f"timm, {workers} workers"] = rate_of(stream, TIMM_BATCHES)
    timm_names = list(contenders)
    stream = device_pipeline(split, policy, device)
    batches = DEVICE_BATCHES.get(device.type, DEVICE_BATCHES["cpu"])
    contenders["device pipeline"] = rate_of(stream, batches)

    # One round to warm up.
    in_turns(contenders, 1)
    seen = in_turns(contenders, rounds)

    # A row for each, and the ratio to the best of timm's.
    title = f"{policy} policy on {device.type}"
    rows = [Row(f"{title}: {name}", "img/s", values) for name, values in seen.items()]
    if policy == "report" and device.type == "cuda":
        rows[-1] = goal(rows[-1].name, rows[-1].values, 500_000, 2_000_000, "img/s")
    best = max(timm_names, key=lambda name: statistics.median(seen[name]))
    ratio_name = f"{title}: device over {best}"
    ratio_values = ratios(seen["device pipeline"], seen[best])
    if (policy, device.type) in GOALS:
        least, aim = GOALS[policy, device.type]
        return [*rows, goal(ratio_name, ratio_values, least, aim)]
    return [*rows, Row(ratio_name, "x", ratio_values)]


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--policy", choices=["report", "plain"], default="report")
    given = options.parse_args()
    split = images(given.dataset, given.data_dir).train
    show(measure(split, given.policy, torch.device(given.device), given.rounds), None, "input")


if __name__ == "__main__":
    main()
