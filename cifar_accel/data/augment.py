"""Augmentation of a whole batch on the device, with parameters drawn per sample from (seed, epoch, sample index).

The parameters are drawn on the host (numpy, microseconds), so the host knows the size of every sub-batch and never
waits for the device. An augmentation is one entry in `draw` and one step in `augment`.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cifar_accel.config import TrainingArguments
from cifar_accel.data.order import Mix, uniform

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Draws:
    """Parameters of n samples; None where an augmentation is off. Boxes and shifts are in source pixels."""

    box: Floats | None  # [n, 4]: y0, x0, height, width of the random resized crop
    shift: NDArray[np.int64] | None  # [n, 2]: top-left corner of the crop within the padded image
    hflip: NDArray[np.bool_] | None  # [n]
    vflip: NDArray[np.bool_] | None  # [n]
    color: Floats | None  # [n, 3]: factors of brightness, contrast, saturation
    pad: int = 0  # reflected pixels around the image that `shift` moves in


def draw(args: TrainingArguments, seed: int, epoch: int, index: NDArray[np.int64], side: tuple[int, int]) -> Draws:
    """Draw the parameters of samples `index` (int64 [n]) in `epoch`; `side` is the source images' (H, W)."""

    def one(purpose: str) -> Floats:
        return uniform(seed, purpose, epoch, index)

    def several(*purposes: str) -> Floats:
        return np.stack([one(p) for p in purposes], 1)

    pad, least, most = args.crop_padding, max(0.0, 1 - args.color_jitter), 1 + args.color_jitter
    return Draws(
        box=_crop_boxes(seed, epoch, index, side, args.scale, args.ratio) if args.scale else None,
        shift=np.floor(several("crop_y", "crop_x") * (2 * pad + 1)).astype(np.int64) if pad else None,
        hflip=one("hflip") < args.hflip if args.hflip else None,
        vflip=one("vflip") < args.vflip if args.vflip else None,
        color=least + several("brightness", "contrast", "saturation") * (most - least) if args.color_jitter else None,
        pad=pad,
    )


def _crop_boxes(
    seed: int,
    epoch: int,
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
    tries = np.arange(10)
    area = h * w * (scale[0] + uniform(seed, "crop_area", epoch, index[:, None], tries) * (scale[1] - scale[0]))
    low, high = np.log(ratio)
    aspect = np.exp(low + uniform(seed, "crop_ratio", epoch, index[:, None], tries) * (high - low))
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (widths <= w) & (heights <= h) & (widths >= 1) & (heights >= 1)
    first, any_fits, rows = fits.argmax(1), fits.any(1), np.arange(len(index))
    whole_w, whole_h = min(w, round(h * ratio[1])), min(h, round(w / ratio[0]))
    bw, bh = (np.where(any_fits, v[rows, first], d) for v, d in ((widths, whole_w), (heights, whole_h)))
    y0 = np.where(any_fits, np.floor(uniform(seed, "crop_y", epoch, index) * (h - bh + 1)), (h - bh) // 2)
    x0 = np.where(any_fits, np.floor(uniform(seed, "crop_x", epoch, index) * (w - bw + 1)), (w - bw) // 2)
    return np.stack([y0, x0, bh, bw], 1)


def augment(images: torch.Tensor, draws: Draws, size: int, interpolation: str) -> torch.Tensor:
    """Apply `draws` to images uint8 [n, 3, H, W] on any device.

    Returns [n, 3, size, size] in 0..255: uint8 if nothing was resampled or coloured, else float32.
    """
    if draws.box is not None:
        images = _resample(images, draws, size, interpolation)
    else:
        if draws.shift is not None or draws.hflip is not None or draws.vflip is not None:
            images = _rearrange(images, draws)
        if images.shape[-2:] != (size, size):
            images = resize(images, (size, size), interpolation)
    return images if draws.color is None else _jitter(images.float(), draws.color)


def _rearrange(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Padded crop and flips, which only move pixels: one gather through a map of rows and one of columns."""
    n, c, h, w = images.shape

    def source(size: int, axis: int, flips: NDArray[np.bool_] | None) -> torch.Tensor:
        """For each sample and output row (or column), the source row: int64 [n, size]."""
        at = np.arange(size)[None].repeat(n, 0)
        if draws.shift is not None:
            at = np.abs(at + draws.shift[:, axis, None] - draws.pad)  # reflection at the first pixel,
            at = size - 1 - np.abs(size - 1 - at)  # and at the last
        if flips is not None:
            at = np.where(flips[:, None], at[:, ::-1], at)
        return torch.from_numpy(at).to(images.device, non_blocking=True)

    rows, columns = source(h, 0, draws.vflip), source(w, 1, draws.hflip)
    places = (rows[:, :, None] * w + columns[:, None, :]).view(n, 1, h * w).expand(n, c, h * w)
    return images.view(n, c, h * w).gather(2, places).view(n, c, h, w)


def _resample(images: torch.Tensor, draws: Draws, size: int, interpolation: str) -> torch.Tensor:
    """Random resized crop and flips in one resampling, float32; pixels outside a box do not bleed into it."""
    assert draws.box is not None

    def grid(axis: int, side: int, flips: NDArray[np.bool_] | None) -> torch.Tensor:
        """Source coordinate of each output row (or column) in grid_sample's [-1, 1]: float32 [n, size]."""
        start, length = draws.box[:, axis, None], draws.box[:, axis + 2, None]  # type: ignore[index]
        at = np.clip(start + (np.arange(size) + 0.5) * length / size - 0.5, start, start + length - 1)
        if flips is not None:
            at = np.where(flips[:, None], at[:, ::-1], at)
        return torch.from_numpy(((2 * at + 1) / side - 1).astype(np.float32)).to(images.device, non_blocking=True)

    h, w = images.shape[-2:]
    y, x = grid(0, h, draws.vflip), grid(1, w, draws.hflip)
    places = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], -1)
    out = F.grid_sample(images.float(), places, interpolation, padding_mode="border", align_corners=False)
    return out if interpolation == "bilinear" else out.clamp_(0, 255)


def resize(images: torch.Tensor, side: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Resize [n, 3, H, W] to `side` with antialiasing, as PIL does; float32 in 0..255."""
    out = F.interpolate(images.float(), side, mode=interpolation, antialias=True, align_corners=False)
    return out if interpolation == "bilinear" else out.clamp_(0, 255)


def _jitter(images: torch.Tensor, factors: Floats) -> torch.Tensor:
    """Brightness, contrast, saturation (in this order) of float images in 0..255; factors [n, 3]; PIL's definitions."""
    scale = torch.from_numpy(factors.astype(np.float32)).to(images.device, non_blocking=True).view(-1, 3, 1, 1, 1)

    def grey(x: torch.Tensor) -> torch.Tensor:
        return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]

    images = (images * scale[:, 0]).clamp_(0, 255)
    mean = grey(images).mean((2, 3), keepdim=True)
    images = torch.lerp(mean, images, scale[:, 1]).clamp_(0, 255)
    return torch.lerp(grey(images), images, scale[:, 2]).clamp_(0, 255)


def erase(images: torch.Tensor, prob: float, seed: int, epoch: int, index: NDArray[np.int64]) -> torch.Tensor:
    """Random erasing (Zhong et al. 2017) with timm's ranges, on normalised images [n, 3, S, S], in place.

    A rectangle of 2 % to a third of the area and an aspect of 0.3 to 3.3 is set to 0, the mean.
    """
    size, tries = images.shape[-1], np.arange(10)
    area = size * size * (0.02 + uniform(seed, "erase_area", epoch, index[:, None], tries) * (1 / 3 - 0.02))
    aspect = np.exp((2 * uniform(seed, "erase_ratio", epoch, index[:, None], tries) - 1) * np.log(10 / 3))
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
        return torch.from_numpy(hit).to(images.device, non_blocking=True)

    mask = inside(heights, "erase_y")[:, None, :, None] & inside(widths, "erase_x")[:, None, None, :]
    return images.masked_fill_(mask, 0)


def mix(images: torch.Tensor, partners: torch.Tensor, how: Mix) -> tuple[torch.Tensor, float]:
    """Mix the first len(partners) images [n, 3, S, S] with `images[partners]`.

    Returns the mixed images and the share of itself that each kept (1 when nothing was mixed).
    """
    m = len(partners)
    if how.lam == 1.0:
        return images[:m], 1.0
    if how.box is None:
        return torch.lerp(images[partners], images[:m], how.lam), how.lam
    size = images.shape[-1]
    y0, x0, y1, x1 = (round(v * size) for v in how.box)
    mixed = images[:m].clone()
    mixed[:, :, y0:y1, x0:x1] = images[partners, :, y0:y1, x0:x1]
    return mixed, 1 - (y1 - y0) * (x1 - x0) / size**2
