"""Augmentation of a whole batch on the device, with parameters drawn per sample.

The parameters follow from (seed, epoch, sample index). They are drawn on the host (numpy,
microseconds), so the host knows the size of every sub-batch and never waits for the device. An
augmentation is one entry in `draw` and one step in `augment`. RandAugment's operations are in
`draws.py` (which and how strong) and `pixels.py` (their pixels).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cifar_accel.data import pixels
from cifar_accel.data.draws import Floats, Program, draw_jitter, draw_policy
from cifar_accel.data.order import Mixing, uniform
from cifar_accel.data.pixels import to_device
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.policy import Policy


@dataclass(frozen=True)
class Draws:
    """Parameters of n samples; places are in source pixels."""

    # [n, 4]: the random resized crop (y0, x0, height, width); None where it is off.
    box: Floats | None
    # [n, 2]: how far down and to the right the crop of the padded image lies.
    shift: NDArray[np.int64]
    # [n]: left-right and upside-down flips.
    hflip: NDArray[np.bool_]
    vflip: NDArray[np.bool_]
    # RandAugment or colour jitter, or None.
    program: Program | None


def draw(
    args: TrainingArguments,
    policy: Policy | None,
    epoch: NDArray[np.int64],
    index: NDArray[np.int64],
    side: tuple[int, int],
    size: int,
) -> Draws:
    """Draw the parameters of samples `index` in epochs `epoch` (int64 [n] each).

    `policy` is what `--aa` says, None for `none`; `side` is (H, W) of the source images, `size` the
    side of what they become.
    """
    seed = args.seed

    # Crops: a resized one, or one within the padded image.
    box = None
    if args.scale is not None:
        box = _crop_boxes(seed, epoch, index, side, args.scale, args.ratio)
    corners = [uniform(seed, purpose, epoch, index) for purpose in ("crop_y", "crop_x")]
    places = 2 * args.crop_padding + 1
    shift = np.floor(np.stack(corners, 1) * places).astype(np.int64) - args.crop_padding

    # Flips.
    hflip = uniform(seed, "hflip", epoch, index) < args.hflip
    if args.alternating_flip:
        # The coin of the first epoch, turned over in every other epoch.
        hflip = (uniform(seed, "hflip", 0, index) < 0.5) ^ (epoch % 2 == 1)
    vflip = uniform(seed, "vflip", epoch, index) < args.vflip

    # Colours, and for RandAugment moves too.
    program = None
    if policy is not None:
        program = draw_policy(policy, seed, epoch, index, (size, size))
    elif args.color_jitter:
        program = draw_jitter(seed, epoch, index, args.color_jitter)
    return Draws(box, shift, hflip, vflip, program)


def _crop_boxes(
    seed: int,
    epoch: NDArray[np.int64],
    index: NDArray[np.int64],
    side: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Floats:
    """Boxes [n, 4] (y0, x0, height, width) of timm's RandomResizedCropAndInterpolation, in pixels.

    Ten tries of a uniform area (in `scale`, a share of the image) and a log-uniform aspect (in
    `ratio`, width over height). Where none fits, the largest centred box with an aspect in `ratio`.
    """
    h, w = side
    low, high = np.log(ratio)
    whole_h = float(min(h, round(w / ratio[0])))
    whole_w = float(min(w, round(h * ratio[1])))

    # Sizes. Each try is made for the samples whose tries so far did not fit into the image.
    box_h = np.full(len(index), whole_h)
    box_w = np.full(len(index), whole_w)
    without_box = np.arange(len(index))
    for attempt in range(10):
        sample = index[without_box]
        sample_epoch = epoch[without_box]
        share = uniform(seed, "crop_area", sample_epoch, sample, attempt)
        area = h * w * (scale[0] + share * (scale[1] - scale[0]))
        share = uniform(seed, "crop_ratio", sample_epoch, sample, attempt)
        aspect = np.exp(low + share * (high - low))
        heights = np.rint(np.sqrt(area / aspect))
        widths = np.rint(np.sqrt(area * aspect))
        fits = (heights >= 1) & (heights <= h) & (widths >= 1) & (widths <= w)
        box_h[without_box[fits]] = heights[fits]
        box_w[without_box[fits]] = widths[fits]
        without_box = without_box[~fits]

    # Places: uniform, but the box that stands in for ten failed tries is centred.
    y0 = np.floor(uniform(seed, "crop_y", epoch, index) * (h - box_h + 1))
    x0 = np.floor(uniform(seed, "crop_x", epoch, index) * (w - box_w + 1))
    y0[without_box] = (h - whole_h) // 2
    x0[without_box] = (w - whole_w) // 2
    return np.stack([y0, x0, box_h, box_w], 1)


def augment(
    images: torch.Tensor,
    draws: Draws,
    size: int,
    interpolation: str,
    fill: tuple[int, ...] = (128, 128, 128),
) -> torch.Tensor:
    """Apply `draws` to images uint8 [n, 3, H, W] on any device.

    `fill` is the colour outside a moved image, one number in 0..255 a channel. Returns whole
    numbers in 0..255 [n, 3, size, size]: uint8 if pixels were only moved about, else float32.
    """
    if draws.box is not None:
        # Crop, resize and flips in one go.
        images = pixels.resize(
            images, (size, size), interpolation, draws.box, draws.hflip, draws.vflip
        )
    else:
        images = _crop_and_flip(images, draws)
        if images.shape[-2:] != (size, size):
            images = pixels.resize(images, (size, size), interpolation)
    if draws.program is None:
        return images
    return pixels.run_program(images.float(), draws.program, fill, interpolation)


def _crop_and_flip(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Padded crop and flips, which only move pixels: one gather for all of them."""
    if not any(drawn.any() for drawn in (draws.shift, draws.hflip, draws.vflip)):
        return images
    n, c, h, w = images.shape
    rows = to_device(_source_lines(h, draws.shift[:, :1], draws.vflip), images.device)
    columns = to_device(_source_lines(w, draws.shift[:, 1:], draws.hflip), images.device)
    # Places in the flattened image [n, 1, h * w], the same for each channel.
    places = (rows[:, :, None] * w + columns[:, None, :]).view(n, 1, h * w).expand(n, c, h * w)
    return images.view(n, c, h * w).gather(2, places).view(n, c, h, w)


def _source_lines(
    size: int, shift: NDArray[np.int64], flips: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """For each of n samples and each output row (or column), the source row: int64 [n, size]."""
    # Reflection at the first pixel, then at the last.
    at = np.abs(np.arange(size) + shift)
    at = size - 1 - np.abs(size - 1 - at)
    return np.where(flips[:, None], at[:, ::-1], at)


def erase(
    images: torch.Tensor, prob: float, seed: int, epoch: int, index: NDArray[np.int64]
) -> torch.Tensor:
    """Random erasing (Zhong et al. 2017) of images [n, 3, S, S] with probability `prob`, in place.

    With timm's ranges: a rectangle of 2 % to a third of the area and an aspect of 0.3 to 3.3.
    Images are normalised, so the rectangle's 0 is the mean. `index` int64 [n] are the samples.
    """
    # Ten tries for each image, of which the first that fits counts: [n, 10].
    size = images.shape[-1]
    tries = np.arange(10)
    share = uniform(seed, "erase_area", epoch, index[:, None], tries)
    area = size * size * (0.02 + share * (1 / 3 - 0.02))
    share = uniform(seed, "erase_ratio", epoch, index[:, None], tries)
    aspect = np.exp((2 * share - 1) * np.log(10 / 3))
    heights = np.rint(np.sqrt(area * aspect))
    widths = np.rint(np.sqrt(area / aspect))
    fits = (heights < size) & (widths < size)

    # The rectangles' sizes; 0 where none fits or the image is not chosen: [n].
    chosen = fits.any(1) & (uniform(seed, "erase", epoch, index) < prob)
    first = (np.arange(len(index)), fits.argmax(1))
    height = np.where(chosen, heights[first], 0)
    width = np.where(chosen, widths[first], 0)

    # Their places.
    y0 = np.floor(uniform(seed, "erase_y", epoch, index) * (size - height + 1))
    x0 = np.floor(uniform(seed, "erase_x", epoch, index) * (size - width + 1))
    rows = to_device(_covered(y0, height, size), images.device)
    columns = to_device(_covered(x0, width, size), images.device)
    return images.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0)


def _covered(start: Floats, length: Floats, size: int) -> NDArray[np.bool_]:
    """Which of `size` pixels lie in start..start+length-1: bool [n, size]."""
    at = np.arange(size)
    return (at >= start[:, None]) & (at < (start + length)[:, None])


def swap_neighbours(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` [n, ...] with neighbours swapped: 0 with 1, 2 with 3, ...; n must be even."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix(images: torch.Tensor, mixing: Mixing) -> tuple[torch.Tensor, float]:
    """Mix each of images [n, 3, S, S] with its neighbour; n must be even.

    Micro-batches begin at even places of the global batch, so an image's partner does not depend on
    how that is cut. Returns the mixed images, and the share of itself that each kept (1: nothing
    was mixed).
    """
    assert len(images) % 2 == 0, "the partner is within the micro-batch"
    if mixing.lam == 1.0:
        return images, 1.0
    if mixing.centre is None:
        # One rounding at a time (lerp may fuse two), so that a batch's size changes nothing.
        other = swap_neighbours(images)
        return (images - other).mul_(mixing.lam).add_(other), mixing.lam

    # CutMix's square, with timm's rounding, and cut off at the image's border.
    size = images.shape[-1]
    side = int(size * (1 - mixing.lam) ** 0.5)
    y, x = (int(fraction * size) for fraction in mixing.centre)
    y0, y1 = max(0, y - side // 2), min(size, y + (side + 1) // 2)
    x0, x1 = max(0, x - side // 2), min(size, x + (side + 1) // 2)
    mixed = images.clone()
    mixed[:, :, y0:y1, x0:x1] = swap_neighbours(images[:, :, y0:y1, x0:x1])
    return mixed, 1 - (y1 - y0) * (x1 - x0) / size**2
