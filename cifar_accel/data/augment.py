"""Augmentation of a whole batch on the device, with parameters drawn per sample from (seed, epoch, sample index).

The parameters are drawn on the host (numpy, microseconds), so the host knows the size of every sub-batch and never
waits for the device. An augmentation is one entry in `draw` and one step in `augment`; RandAugment's operations are in
`programs.py` (which and how strong) and `pixels.py` (their pixels).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cifar_accel.data import pixels
from cifar_accel.data.draws import Floats, Program, draw_jitter, draw_policy
from cifar_accel.data.order import Mix, uniform
from cifar_accel.data.pixels import to_device
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.policy import read_policy


@dataclass(frozen=True)
class Draws:
    """Parameters of n samples; None where an augmentation is off. Boxes and shifts are in source pixels."""

    box: Floats | None  # [n, 4]: y0, x0, height, width of the random resized crop
    shift: NDArray[np.int64] | None  # [n, 2]: top-left corner of the crop within the padded image
    hflip: NDArray[np.bool_] | None  # [n]
    vflip: NDArray[np.bool_] | None  # [n]
    program: Program | None  # RandAugment or colour jitter
    pad: int = 0  # reflected pixels around the image that `shift` moves in


def draw(
    args: TrainingArguments,
    epoch: NDArray[np.int64],
    index: NDArray[np.int64],
    side: tuple[int, int],
) -> Draws:
    """Draw the parameters of samples `index` in epochs `epoch` (int64 [n]); `side` is the source images' (H, W)."""
    seed = args.seed

    def one(purpose: str) -> Floats:
        return uniform(seed, purpose, epoch, index)

    def several(*purposes: str) -> Floats:
        return np.stack([one(p) for p in purposes], 1)

    pad, program = args.crop_padding, None
    if args.aa != "none":
        program = draw_policy(
            read_policy(args.aa), seed, epoch, index, (args.image_size, args.image_size)
        )
    elif args.color_jitter:
        program = draw_jitter(seed, epoch, index, args.color_jitter)
    hflip = one("hflip") < args.hflip if args.hflip else None
    if args.alternating_flip:  # the first epoch's coin, turned over in every other epoch
        hflip = (uniform(seed, "hflip", 0, index) < 0.5) ^ (epoch % 2 == 1)
    return Draws(
        box=_crop_boxes(seed, epoch, index, side, args.scale, args.ratio) if args.scale else None,
        shift=np.floor(several("crop_y", "crop_x") * (2 * pad + 1)).astype(np.int64)
        if pad
        else None,
        hflip=hflip,
        vflip=one("vflip") < args.vflip if args.vflip else None,
        program=program,
        pad=pad,
    )


def _crop_boxes(
    seed: int,
    epoch: NDArray[np.int64],
    index: NDArray[np.int64],
    side: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Floats:
    """Boxes [n, 4] (y0, x0, h, w) of timm's RandomResizedCropAndInterpolation.

    Up to ten tries of a uniform area and a log-uniform aspect; when none fits, the largest centred box whose aspect
    lies in `ratio`.
    """
    h, w = side
    low, high = np.log(ratio)
    whole = float(min(h, round(w / ratio[0]))), float(min(w, round(h * ratio[1])))
    box_h, box_w = np.full(len(index), whole[0]), np.full(len(index), whole[1])
    left = np.arange(len(index))  # those that have no box yet
    for attempt in range(10):
        at, when = index[left], epoch[left]
        area = (
            h
            * w
            * (scale[0] + uniform(seed, "crop_area", when, at, attempt) * (scale[1] - scale[0]))
        )
        aspect = np.exp(low + uniform(seed, "crop_ratio", when, at, attempt) * (high - low))
        widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (widths <= w) & (heights <= h) & (widths >= 1) & (heights >= 1)
        box_h[left[fits]], box_w[left[fits]] = heights[fits], widths[fits]
        left = left[~fits]
        if not len(left):
            break
    y0, x0 = (
        np.floor(uniform(seed, purpose, epoch, index) * (full - length + 1))
        for purpose, full, length in (("crop_y", h, box_h), ("crop_x", w, box_w))
    )
    y0[left], x0[left] = (h - whole[0]) // 2, (w - whole[1]) // 2
    return np.stack([y0, x0, box_h, box_w], 1)


def augment(
    images: torch.Tensor,
    draws: Draws,
    size: int,
    interpolation: str,
    fill: tuple[int, ...] = (128, 128, 128),
) -> torch.Tensor:
    """Apply `draws` to images uint8 [n, 3, H, W] on any device; `fill` is the colour (0..255) outside a moved image.

    Returns whole numbers in 0..255 [n, 3, size, size]: uint8 if pixels were only moved about, else float32.
    """
    if draws.box is not None:
        images = pixels.resize(
            images, (size, size), interpolation, draws.box, draws.hflip, draws.vflip
        )
    else:
        if draws.shift is not None or draws.hflip is not None or draws.vflip is not None:
            images = _rearrange(images, draws)
        if images.shape[-2:] != (size, size):
            images = pixels.resize(images, (size, size), interpolation)
    return (
        images
        if draws.program is None
        else pixels.run_program(images.float(), draws.program, fill, interpolation)
    )


def _rearrange(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Padded crop and flips, which only move pixels: one gather through a map of rows and one of columns."""
    n, c, h, w = images.shape

    def source(size: int, axis: int, flips: NDArray[np.bool_] | None) -> torch.Tensor:
        """For each sample and output row (or column), the source row: int64 [n, size]."""
        at = np.arange(size)[None].repeat(n, 0)
        if draws.shift is not None:
            at = np.abs(
                at + draws.shift[:, axis, None] - draws.pad
            )  # reflection at the first pixel,
            at = size - 1 - np.abs(size - 1 - at)  # and at the last
        if flips is not None:
            at = np.where(flips[:, None], at[:, ::-1], at)
        return to_device(at, images.device)

    rows, columns = source(h, 0, draws.vflip), source(w, 1, draws.hflip)
    places = (rows[:, :, None] * w + columns[:, None, :]).view(n, 1, h * w).expand(n, c, h * w)
    return images.view(n, c, h * w).gather(2, places).view(n, c, h, w)


def erase(
    images: torch.Tensor, prob: float, seed: int, epoch: NDArray[np.int64], index: NDArray[np.int64]
) -> torch.Tensor:
    """Random erasing (Zhong et al. 2017) with timm's ranges, on normalised images [n, 3, S, S], in place.

    A rectangle of 2 % to a third of the area and an aspect of 0.3 to 3.3 is set to 0, the mean.
    """
    size, tries = images.shape[-1], np.arange(10)
    area = (
        size
        * size
        * (
            0.02
            + uniform(seed, "erase_area", epoch[:, None], index[:, None], tries) * (1 / 3 - 0.02)
        )
    )
    aspect = np.exp(
        (2 * uniform(seed, "erase_ratio", epoch[:, None], index[:, None], tries) - 1)
        * np.log(10 / 3)
    )
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < size) & (widths < size)
    rows, first = np.arange(len(index)), fits.argmax(1)
    chosen = fits.any(1) & (uniform(seed, "erase", epoch, index) < prob)

    def inside(lengths: Floats, purpose: str) -> torch.Tensor:
        """Which rows (or columns) of each image are erased: bool [n, S]."""
        length = np.where(chosen, lengths[rows, first], 0)
        start = np.floor(uniform(seed, purpose, epoch, index) * (size - length + 1))
        at = np.arange(size)
        hit = (at >= start[:, None]) & (at < (start + length)[:, None])
        return to_device(hit, images.device)

    mask = (
        inside(heights, "erase_y")[:, None, :, None] & inside(widths, "erase_x")[:, None, None, :]
    )
    return images.masked_fill_(mask, 0)


def mix(images: torch.Tensor, partners: torch.Tensor, how: Mix) -> tuple[torch.Tensor, float]:
    """Mix the first len(partners) images [n, 3, S, S] with `images[partners]`.

    Returns the mixed images and the share of itself that each kept (1 when nothing was mixed).
    """
    m = len(partners)
    if how.lam == 1.0:
        return images[:m], 1.0
    if how.centre is None:
        other = images[
            partners
        ]  # one rounding at a time (lerp may fuse two), so that a batch's size changes nothing
        return (images[:m] - other).mul_(how.lam).add_(other), how.lam
    size = images.shape[-1]
    side = int(size * (1 - how.lam) ** 0.5)  # timm's rounding of Yun et al.'s square
    (y0, y1), (x0, x1) = (
        (max(0, c - side // 2), min(size, c + (side + 1) // 2))
        for c in (int(v * size) for v in how.centre)
    )
    mixed = images[:m].clone()
    mixed[:, :, y0:y1, x0:x1] = images[partners, :, y0:y1, x0:x1]
    return mixed, 1 - (y1 - y0) * (x1 - x0) / size**2
