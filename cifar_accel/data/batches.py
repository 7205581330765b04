"""Batches for training and evaluation: normalised images, labels and targets on the device.

The samples, the mixing and every random number come from `order.py`. Pixels come from one of two
sources: `resident.py` (images on the device, augmented there in batches) or `timm_loader.py`
(timm's transforms in worker processes). Either gives the same run on any number of processes and
goes on at any step.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cifar_accel.data import augment
from cifar_accel.data.datasets import Split
from cifar_accel.data.order import MicroBatch, Order, evaluation_places, micro_batches
from cifar_accel.data.pixels import to_device
from cifar_accel.data.resident import ResidentImages
from cifar_accel.data.timm_loader import TimmImages
from cifar_accel.options.options import TrainingArguments


class Batch(NamedTuple):
    """One micro-batch on the device."""

    # float32 [m, 3, S, S], normalised and mixed.
    images: torch.Tensor
    # int64 [m], what accuracy is counted against: under mixing, the class with the largest target.
    # In an evaluation, -1 marks a place that is only filled up and must not count.
    labels: torch.Tensor
    # float32 [m, classes], mixed and smoothed; None in an evaluation.
    targets: torch.Tensor | None = None


class PixelSource(Protocol):
    """Where pixels come from: whole numbers in 0..255 of any dtype, on any device, [n, 3, S, S].

    They come in the order in which they are asked for. A source may read ahead.
    """

    def training(
        self, micro_batches: Iterator[MicroBatch]
    ) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
        """Each micro-batch with its augmented pixels."""

    def evaluation(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[torch.Tensor]:
        """Pixels of each batch of samples, not augmented."""


class Pipeline:
    """Batches of one split for one process.

    `mean` and `std` have one value a channel and are for images in [0, 1].
    """

    def __init__(
        self,
        args: TrainingArguments,
        split: Split,
        device: torch.device,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        self.args = args
        self.split = split
        self.device = device
        self.mean = mean
        self.std = std
        self.pixels: PixelSource
        if args.pipeline == "device":
            self.pixels = ResidentImages(args, split.images, device, mean)
        else:
            self.pixels = TimmImages(args, split.images, device, mean)
        # (pixel / 255 - mean) / std = pixel * scale - offset, with both [1, 3, 1, 1].
        scale = torch.tensor(std, device=device).mul(255).reciprocal()
        offset = torch.tensor(mean, device=device) * 255 * scale
        self.scale = scale.view(1, -1, 1, 1)
        self.offset = offset.view(1, -1, 1, 1)

    def training_batches(
        self, order: Order, start: int, stop: int, size_of: Callable[[int], int] | None = None
    ) -> Generator[Batch, None, None]:
        """Micro-batches of optimizer steps start..stop-1, `order.accumulation` of them a step.

        They go on over epoch borders. `size_of` gives the images' side at a step (unset: the last
        of --image-size). With `--mixup` or `--cutmix` a micro-batch must be even.
        """
        args = self.args
        size_of = size_of or (lambda step: args.input_size)
        classes = len(self.split.classes)
        mixes = bool(args.mixup or args.cutmix)
        planned = micro_batches(order, start, stop, size_of)
        for micro_batch, values in self.pixels.training(planned):
            step, epoch, samples, _ = micro_batch
            # What is drawn is drawn on the host: nothing here waits for the device.
            images = self._normalise(values)
            if args.reprob:
                images = augment.erase(images, args.reprob, args.seed, epoch, samples)
            labels = to_device(self.split.labels[samples], self.device)
            targets = smooth_one_hot(labels, classes, args.smoothing)
            if mixes:
                # Images and targets alike: `kept` of their own, the rest of their neighbour's. One
                # rounding at a time, so that the result is the same on any device.
                mixing = order.mixing_of_step(step, args.mixup, args.cutmix, args.mixup_prob)
                images, kept = augment.mix(images, mixing)
                other = augment.swap_neighbours(targets)
                targets = targets.sub_(other).mul_(kept).add_(other)
                labels = targets.argmax(1)
            yield Batch(images, labels, targets)

    def evaluation_batches(
        self, batch_size: int, world: int = 1, rank: int = 0
    ) -> Generator[Batch, None, None]:
        """This process's share of the split, every image once over all processes.

        Every process has the same number of batches, all of one size of at most `batch_size`.
        Places for which there is no image show the last one, with label -1.
        """
        images = len(self.split)
        # Places in the split, the images shown there and their labels, batch by batch.
        places = evaluation_places(images, batch_size, world, rank)
        samples = np.minimum(places, images - 1)
        labels = np.where(places < images, self.split.labels[samples], -1)
        for values, batch_labels in zip(self.pixels.evaluation(samples), labels, strict=True):
            yield Batch(self._normalise(values), to_device(batch_labels, self.device))

    def _normalise(self, values: torch.Tensor) -> torch.Tensor:
        """Pixels in 0..255 (any dtype) -> normalised float32 on the device."""
        return values.to(self.device, non_blocking=True).float().mul(self.scale).sub_(self.offset)


def smooth_one_hot(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """Targets float32 [n, classes] of labels int64 [n].

    Rows sum to 1; `smoothing` of that is spread over all classes.
    """
    off = smoothing / classes
    targets = torch.full((len(labels), classes), off, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)
