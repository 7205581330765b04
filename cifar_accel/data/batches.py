"""Two input pipelines behind one interface: `device` (resident images, batched augmentation) and `timm` (PIL, workers).

Both take the samples, the mixing and every random number from `order.py`, so either gives the same run on any number of
processes and goes on at any step. They differ only in who makes the pixels.
"""

import itertools
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from cifar_accel.data import augment, pixels
from cifar_accel.data.datasets import Split
from cifar_accel.data.order import Order, Rows, plan
from cifar_accel.data.pixels import to_device
from cifar_accel.data.timm_loader import _ignore_signals, _TimmImages
from cifar_accel.options.options import TrainingArguments

# Pixels augmented at once, over as many micro-batches as that takes: enough to pay for the calls of a policy's many
# small sub-batches, few enough for a processor's cache.
CHUNK_PIXELS = {"cpu": 2**20, "cuda": 2**23}


class Batch(NamedTuple):
    """One micro-batch on the device."""

    images: torch.Tensor  # float32 [m, 3, S, S], normalised and mixed
    labels: torch.Tensor  # int64 [m]
    targets: torch.Tensor  # float32 [m, classes]: mixed and smoothed


@dataclass
class Pipeline:
    """Batches of one split for one process; `mean` and `std` (one value a channel) are for images in [0, 1]."""

    args: TrainingArguments
    split: Split
    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        self.labels = torch.from_numpy(self.split.labels).to(self.device)
        self.resident = self.args.pipeline == "device"
        if self.resident:
            self.images = torch.from_numpy(np.asarray(self.split.images)).to(
                self.device
            )  # uint8 [N, 3, H, W]
        else:
            self.timm = {
                t: _TimmImages(self.args, self.split.images, self.mean, t) for t in (True, False)
            }
        scale = torch.tensor(self.std, device=self.device).mul(255).reciprocal()
        self.scale = scale.view(1, -1, 1, 1)
        self.offset = (torch.tensor(self.mean, device=self.device) * 255 * scale).view(1, -1, 1, 1)

    def training_batches(self, order: Order, start: int, stop: int) -> Generator[Batch, None, None]:
        """Micro-batches of optimizer steps start..stop-1, `order.accumulation` of them a step, over epoch borders."""
        args, classes = self.args, len(self.split.classes)
        mixing = bool(args.mixup or args.cutmix)
        raw = self._training_pixels if self.resident else partial(self._worker_pixels, True)
        for rows, values in zip(
            plan(order, start, stop, mixing), raw(plan(order, start, stop, mixing)), strict=True
        ):
            images = self._normalise(values)
            if args.reprob:
                epoch = np.full(len(rows.samples), rows.epoch)
                images = augment.erase(images, args.reprob, args.seed, epoch, rows.samples)
            labels = self.labels[to_device(rows.samples, self.device)]
            own = labels[: len(rows.partners)]
            targets = smooth_one_hot(own, classes, args.smoothing)
            if mixing:
                partners = to_device(rows.partners, self.device)
                how = order.mix(rows.step, args.mixup, args.cutmix, args.mixup_prob)
                images, kept = augment.mix(images, partners, how)
                other = smooth_one_hot(labels[partners], classes, args.smoothing)
                targets = targets.sub_(other).mul_(kept).add_(other)
            yield Batch(images, own, targets)

    def evaluation_batches(self, batch_size: int, world: int = 1, rank: int = 0) -> Iterator[Batch]:
        """This process's share of the split, every image once over all processes; the last batch may be short."""
        share = np.array_split(np.arange(len(self.split)), world)[rank]
        rows = [
            Rows(0, 0, share[i : i + batch_size], share[:0])
            for i in range(0, len(share), batch_size)
        ]
        raw = self._evaluation_pixels if self.resident else partial(self._worker_pixels, False)
        for row, values in zip(rows, raw(iter(rows)), strict=True):
            labels = self.labels[to_device(row.samples, self.device)]
            yield Batch(
                self._normalise(values),
                labels,
                smooth_one_hot(labels, len(self.split.classes), 0.0),
            )

    def _normalise(self, values: torch.Tensor) -> torch.Tensor:
        """Pixels in 0..255 (any dtype) -> normalised float32 on the device."""
        return values.to(self.device, non_blocking=True).float().mul(self.scale).sub_(self.offset)

    # -- pixels made on the device

    def _training_pixels(self, rows: Iterator[Rows]) -> Iterator[torch.Tensor]:
        args, side = self.args, self.split.images.shape[2:]
        fill = tuple(min(255, round(255 * m)) for m in self.mean)
        limit = CHUNK_PIXELS.get(self.device.type, 2**20) // max(*side, args.image_size) ** 2
        for first in rows:
            more = itertools.islice(rows, max(0, limit // len(first.samples) - 1))
            chunk = [first, *more]
            index = np.concatenate([row.samples for row in chunk])
            epoch = np.concatenate([np.full(len(row.samples), row.epoch) for row in chunk])
            images = self.images.index_select(0, to_device(index, self.device))
            draws = augment.draw(args, epoch, index, side)
            images = augment.augment(images, draws, args.image_size, args.interpolation, fill)
            yield from images.split([len(row.samples) for row in chunk])

    def _evaluation_pixels(self, rows: Iterator[Rows]) -> Iterator[torch.Tensor]:
        """timm's test transform: the shorter side to image_size / crop_pct, then the centre."""
        size, h, w = self.args.image_size, *self.split.images.shape[2:]
        shorter = math.floor(size / self.args.crop_pct)
        side = (round(h * shorter / min(h, w)), round(w * shorter / min(h, w)))
        top, left = round((side[0] - size) / 2), round((side[1] - size) / 2)
        for row in rows:
            images = self.images.index_select(0, to_device(row.samples, self.device))
            if side != (h, w):
                images = pixels.resize(images, side, self.args.interpolation)
            yield images[..., top : top + size, left : left + size]

    # -- pixels made by timm in worker processes

    def _worker_pixels(self, training: bool, rows: Iterator[Rows]) -> Iterator[torch.Tensor]:
        """uint8 [n, 3, S, S] of each of `rows`, in order, made ahead of time by `--workers` processes."""
        loader = DataLoader(
            self.timm[training],
            sampler=rows,  # type: ignore[arg-type]  # any iterator of indices will do; ours are whole micro-batches
            batch_size=None,
            num_workers=self.args.workers or 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # its own, so that it draws nothing from the global one
        )
        yield from loader


def smooth_one_hot(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """Targets float32 [n, classes] of labels int64 [n]; rows sum to 1, `smoothing` of it over all classes."""
    off = smoothing / classes
    targets = torch.full((len(labels), classes), off, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)
