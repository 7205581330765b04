"""Pixels made on the device: the images live there and are augmented there, many at a time."""

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from cifar_accel.data import augment, pixels
from cifar_accel.data.order import MicroBatch
from cifar_accel.data.pixels import to_device
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.policy import read_policy

# Augment this many pixels per call, over several micro-batches if that takes them: large enough to
# amortise the launches of a policy's many small sub-batches, small enough for a processor's cache.
CHUNK_PIXELS = {"cpu": 2**20, "cuda": 2**23}


class ResidentImages:
    """A source of pixels (see `batches.PixelSource`) that holds all images on the device."""

    def __init__(
        self,
        args: TrainingArguments,
        images: NDArray[np.uint8],
        device: torch.device,
        mean: tuple[float, ...],
    ):
        self.args = args
        self.device = device
        # uint8 [N, 3, H, W]
        self.images = torch.from_numpy(np.asarray(images)).to(device)
        self.side = (images.shape[2], images.shape[3])
        self.policy = None if args.aa == "none" else read_policy(args.aa)
        # The colour outside a moved image, as timm has it.
        self.fill = tuple(min(255, round(255 * m)) for m in mean)

    def training(
        self, micro_batches: Iterator[MicroBatch]
    ) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
        """Each micro-batch with its augmented pixels: uint8 or float32 [n, 3, S, S] in 0..255."""
        for size, planned in itertools.groupby(micro_batches, lambda planned: planned.size):
            yield from self._of_one_size(planned, size)

    def _of_one_size(
        self, micro_batches: Iterator[MicroBatch], size: int
    ) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
        args = self.args
        largest_side = max(*self.side, size)
        images_per_chunk = CHUNK_PIXELS.get(self.device.type, 2**20) // largest_side**2
        for first in micro_batches:
            # As many micro-batches as fit, at least one; they may be of several epochs.
            others = max(0, images_per_chunk // len(first.samples) - 1)
            chunk = [first, *itertools.islice(micro_batches, others)]
            lengths = [len(micro_batch.samples) for micro_batch in chunk]
            index = np.concatenate([micro_batch.samples for micro_batch in chunk])
            epoch = np.repeat([micro_batch.epoch for micro_batch in chunk], lengths)

            # Augment them together. What a sample becomes does not depend on its chunk.
            images = self.images.index_select(0, to_device(index, self.device))
            draws = augment.draw(args, self.policy, epoch, index, self.side, size)
            images = augment.augment(images, draws, size, args.interpolation, self.fill)
            yield from zip(chunk, images.split(lengths), strict=True)

    def evaluation(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[torch.Tensor]:
        """Pixels of each batch of samples: uint8 or float32 [n, 3, S, S] in 0..255.

        timm's test transform: the shorter side to image_size / crop_pct, then the centre.
        """
        h, w = self.side
        size = self.args.input_size
        shorter = math.floor(size / self.args.crop_pct)
        # Rounded down, as torchvision does it.
        side = (int(shorter * h / min(h, w)), int(shorter * w / min(h, w)))
        top = round((side[0] - size) / 2)
        left = round((side[1] - size) / 2)
        for samples in batches:
            images = self.images.index_select(0, to_device(samples, self.device))
            if side != self.side:
                images = pixels.resize(images, side, self.args.interpolation)
            yield images[..., top : top + size, left : left + size]
