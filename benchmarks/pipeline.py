"""Images per second of the device pipeline against timm's create_loader, in turns, in one process.

    python -m benchmarks.pipeline [DATASET] [--policy report|plain] [--rounds 5]

Both sides do the same work to a float32 batch of 256 on --device. `report`: random resized crop,
both flips, rand-m15-n2, normalise, Mixup. `plain`: crop of the image padded by 4 pixels, left-right
flip, normalise.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

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

BATCH, WORKERS = 256, (0, 2, 4)
GOALS = {("report", "cpu"): (3, 5), ("plain", "cpu"): (8, 15)}


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


def timm_loader(split: Split, policy: str, workers: int, device: torch.device) -> Iterator[object]:
    """timm's create_loader, with its prefetcher where there is CUDA; for `plain` its transform is replaced."""
    cuda = device.type == "cuda"
    loader = timm.data.create_loader(
        Pictures(split), (3, 32, 32), BATCH, is_training=True, num_workers=workers, use_prefetcher=cuda, hflip=0.5,
        vflip=0.5, auto_augment="rand-m15-n2", color_jitter=0.0, interpolation="bilinear", mean=IMAGENET_MEAN,
        std=IMAGENET_STD, device=device, persistent_workers=workers > 0, pin_memory=cuda,
    )  # fmt: skip
    if policy == "plain":
        tensor = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        last = [timm.data.transforms.ToNumpy()] if cuda else tensor
        crop = transforms.RandomCrop(32, padding=4, padding_mode="reflect")
        loader.dataset.transform = transforms.Compose(
            [crop, transforms.RandomHorizontalFlip(), *last]
        )
    mixing = timm.data.Mixup(0.8, prob=0.7, label_smoothing=0.1, num_classes=len(split.classes))
    while True:
        for x, y in loader:
            yield mixing(x, y) if policy == "report" else (x, y)


def device_pipeline(split: Split, policy: str, device: torch.device) -> Iterator[object]:
    """This project's resident pipeline."""
    args = recipe_defaults(policy)
    pipeline = Pipeline(replace(args, smoothing=0.1), split, device, IMAGENET_MEAN, IMAGENET_STD)
    return pipeline.training_batches(Order(0, len(split), BATCH), 0, 10**9)


def images_per_s(stream: Iterator[object], batches: int, device: torch.device) -> float:
    """Throughput of the next `batches` batches, the device being done at both ends."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(8):  # what the workers made while the others were measured
        next(stream)
    wait()
    started = time.perf_counter()
    for _ in range(batches):
        next(stream)
    wait()
    return batches * BATCH / (time.perf_counter() - started)


def measure(split: Split, policy: str, device: torch.device, rounds: int) -> list[Row]:
    """The rows of one policy."""
    streams = {f"timm, {w} workers": timm_loader(split, policy, w, device) for w in WORKERS}
    streams["device pipeline"] = device_pipeline(split, policy, device)
    ours = 2048 if device.type == "cuda" else 192

    def one(name: str, stream: Iterator[object]) -> Callable[[], float]:
        return lambda: images_per_s(stream, ours if name == "device pipeline" else 24, device)

    contenders = {name: one(name, stream) for name, stream in streams.items()}
    in_turns(contenders, 1)
    seen = in_turns(contenders, rounds)
    best = max(
        (f"timm, {w} workers" for w in WORKERS), key=lambda name: statistics.median(seen[name])
    )
    rows = [
        Row(f"{policy} policy on {device.type}: {name}", "img/s", values)
        for name, values in seen.items()
    ]
    if policy == "report" and device.type == "cuda":
        rows[-1] = goal(rows[-1].name, rows[-1].values, 500_000, 2_000_000, "img/s")
    over = ratios(seen["device pipeline"], seen[best])
    name = f"{policy} policy on {device.type}: device over {best}"
    limits = GOALS.get((policy, device.type))
    return [*rows, goal(name, over, *limits) if limits else Row(name, "x", over)]


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--policy", choices=["report", "plain"], default="report")
    given = options.parse_args()
    split = images(given.dataset, given.data_dir).train
    show(measure(split, given.policy, torch.device(given.device), given.rounds), None, "input")


if __name__ == "__main__":
    main()
