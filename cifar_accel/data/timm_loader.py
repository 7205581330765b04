"""timm's transforms in worker processes: the other way to make pixels."""

import random
import signal
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cifar_accel.data.order import Rows, random_bits
from cifar_accel.errors import BadInput
from cifar_accel.options.options import TrainingArguments


class _TimmImages(torch.utils.data.Dataset[torch.Tensor]):
    """timm's transforms over an array of images; an index is one `Rows`, an item its pixels uint8 [n, 3, S, S]."""

    def __init__(
        self,
        args: TrainingArguments,
        images: NDArray[np.uint8],
        mean: tuple[float, ...],
        training: bool,
    ):
        from timm.data import auto_augment, create_transform

        for name, operation in auto_augment.NAME_TO_OP.items():
            if operation is auto_augment.posterize:
                auto_augment.NAME_TO_OP[name] = _posterize
        self.images, self.seed, self.training = images, args.seed, training
        augmentation: dict[str, Any] = dict(
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            auto_augment=None if args.aa == "none" else args.aa,
            color_jitter=args.color_jitter or None,
        )
        try:  # use_prefetcher leaves the image uint8; mean is the colour that geometric operations fill with
            self.transform: Any = create_transform(
                args.image_size,
                is_training=training,
                use_prefetcher=True,
                interpolation=args.interpolation,
                mean=mean,
                crop_pct=args.crop_pct,
                **(augmentation if training else {}),
            )
        except (AssertionError, ValueError, KeyError, TypeError) as e:
            raise BadInput(f"--aa {args.aa}: timm cannot read this policy ({e!r})") from e
        if (
            training and args.scale is None
        ):  # timm always crops and resizes here: put ours in its place
            self.transform.transforms[0] = _PilCrop(
                args.crop_padding, args.image_size, args.interpolation
            )

    def __getitem__(self, rows: Rows) -> torch.Tensor:
        seeds = random_bits(self.seed, "sample_seed", rows.epoch, rows.samples)
        return torch.stack([self._one(i, int(s)) for i, s in zip(rows.samples, seeds, strict=True)])

    def _one(self, index: int, seed: int) -> torch.Tensor:
        if self.training:  # timm draws from all three generators
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            torch.default_generator.manual_seed(seed >> 1)
        return self.transform(Image.fromarray(self.images[index].transpose(1, 2, 0)))


def _posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    """timm's, also for the 0 bits that its policies ask for and Pillow 13 refuses: a black image."""
    keep = 256 - 2 ** (8 - min(max(bits_to_keep, 0), 8))
    return image.point([value & keep for value in range(256)] * len(image.getbands()))


class _PilCrop:
    """Padded random crop (torchvision's, by reflection) and resize to the model's input."""

    def __init__(self, padding: int, size: int, interpolation: str):
        self.padding, self.size, self.resample = (
            padding,
            size,
            Image.Resampling[interpolation.upper()],
        )

    def __call__(self, image: Image.Image) -> Image.Image:
        from torchvision.transforms import RandomCrop

        if self.padding:
            crop = RandomCrop(image.size[::-1], padding=self.padding, padding_mode="reflect")
            image = crop(image)
        return (
            image
            if image.size == (self.size, self.size)
            else image.resize((self.size, self.size), self.resample)
        )


def _ignore_signals(worker: int) -> None:
    """Workers live until the training process dismisses them, also when a signal reaches the whole process group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
