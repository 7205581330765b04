"""Pillow's image operations on whole batches, on any device, pixel for pixel.

Images are float32 [n, 3, H, W] that hold whole numbers from 0 to 255, and each operation rounds as
Pillow rounds. All sums are of numbers that float32 (or float64, where Pillow takes double) holds
exactly, or follow Pillow's order one rounding at a time. So a sample's pixels depend neither on the
batch around it nor on the device, and the tests compare with Pillow itself. Whoever changes the
order of operations here changes pixels.
"""

from collections.abc import Callable
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray

from cifar_accel.data.draws import MOVES, NOTHING, Floats, Program
from cifar_accel.options.policy import NAMES


def to_device(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """`array` on `device`; the host does not wait for CUDA. mps has no float64 and gets float32."""
    tensor = torch.from_numpy(array)
    if device.type == "mps" and tensor.dtype == torch.float64:
        tensor = tensor.float()
    # A copy that does not block has to start from pinned memory.
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def run_program(
    images: torch.Tensor, program: Program, fill: tuple[int, ...], interpolation: str
) -> torch.Tensor:
    """Apply `program` to its images float32 [n, 3, H, W], layer by layer, in place.

    `fill` is the colour that appears outside a moved image: one number in 0..255 a channel.
    """
    # The sub-batches in the order of their application: for each layer and kernel, the images that
    # take it. The host has drawn the program, so it knows their sizes without asking the device.
    kernels = KERNELS[program.operations]
    codes = []
    members = []
    arguments = []
    for layer in range(kernels.shape[1]):
        for code in np.unique(kernels[:, layer]):
            if code == NOTHING:
                continue
            group = np.flatnonzero(kernels[:, layer] == code)
            codes.append(code)
            members.append(group)
            arguments.append(program.arguments[group, layer])
    if not codes:
        return images

    # Three copies to the device in place of three for each sub-batch.
    sizes = [len(group) for group in members]
    rows_by_group = to_device(np.concatenate(members), images.device).split(sizes)
    arguments_by_group = to_device(np.concatenate(arguments), images.device).split(sizes)
    outside = to_device(np.array(fill, np.float32), images.device).view(1, -1, 1, 1)

    # Take each sub-batch out, change it, put it back.
    for code, rows, values in zip(codes, rows_by_group, arguments_by_group, strict=True):
        name = NAMES[code]
        chosen = images.index_select(0, rows)
        if name in OPERATIONS:
            changed = OPERATIONS[name](chosen, values[:, :1, None, None])
        else:
            across, down = MOVES[name]
            changed = affine(chosen, values, outside, interpolation, across, down)
        images.index_copy_(0, rows, changed)
    return images


# ---- operations on colours: images float32 [n, 3, H, W] and one argument a sample [n, 1, 1, 1]


def blend(start: torch.Tensor, end: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Pillow's Image.blend: from `start` towards (and beyond) `end`, clipped and truncated."""
    return (end - start).mul_(share.float()).add_(start).clamp_(0, 255).floor_()


def grey(x: torch.Tensor) -> torch.Tensor:
    """Pillow's luma, in 16-bit fixed point; all sums are below 2**24."""
    red, green, blue = x.split(1, 1)
    return (red * 19595 + green * 38470 + blue * 7471).add_(32768).mul_(2.0**-16).floor_()


def brightness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageEnhance.Brightness: away from black."""
    return blend(x.new_zeros(()), x, factor)


def contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageEnhance.Contrast: away from the mean grey, rounded."""
    pixels = x.shape[2] * x.shape[3]
    total = grey(x).sum((2, 3), keepdim=True, dtype=torch.int64)
    # total / pixels, rounded half up, in whole numbers.
    mean = (2 * total + pixels) // (2 * pixels)
    return blend(mean.float(), x, factor)


def color(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageEnhance.Color: away from its own grey."""
    return blend(grey(x), x, factor)


def sharpness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageEnhance.Sharpness: away from a 3x3 smoothing that spares the border."""
    smooth = x.clone()
    if min(x.shape[2:]) > 2:
        # Weights 1, and 5 in the middle; the sum is over 13.
        rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + x[:, :, 1:-1, 1:-1] * 4
        smooth[:, :, 1:-1, 1:-1] = ((total * 2 + 13) / 26).floor_()
    return blend(smooth, x, factor)


def solarize(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Invert what is at or above `threshold`."""
    return torch.where(x < threshold, x, 255 - x)


def solarize_add(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Add `amount` (at most 128) to what is below 128."""
    return torch.where(x < 128, x + amount.float(), x)


def posterize(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Keep the highest `bits` bits."""
    step = torch.exp2(8 - bits.clamp(0, 8)).float()
    return (x / step).floor_().mul_(step)


def autocontrast(x: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageOps.autocontrast: each channel stretched to 0..255; a flat one stays."""
    # `argument` gives nothing but its precision: float64, as Pillow computes (float32 on mps).
    low = x.amin((2, 3), keepdim=True).to(argument.dtype)
    high = x.amax((2, 3), keepdim=True).to(argument.dtype)
    # A true division: `255 / x` would multiply by the reciprocal, which rounds twice.
    scale = torch.div(torch.full_like(low, 255), (high - low).clamp_(min=1))
    stretched = (x * scale).add_(-low * scale).clamp_(0, 255).floor_().float()
    return torch.where(high > low, stretched, x)


def equalize(x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageOps.equalize: each channel through its own cumulated histogram."""
    # The histograms: int64 [n * channels, 256].
    n, channels, h, w = x.shape
    values = x.reshape(n * channels, h * w).long()
    counts = torch.zeros(n * channels, 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, values, torch.ones_like(values))
    # Pillow's step is that of all pixels but those of the brightest level.
    brightest = counts.gather(1, values.amax(1, keepdim=True))
    step = (h * w - brightest) // 255
    # What each level becomes. A step of 0 leaves the channel as it is.
    before = counts.cumsum(1) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, table.gather(1, values), values).view_as(x).float()


# The operations on colours by name; `affine` does all the others.
OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    # Its argument, the threshold, is 0.
    "invert": solarize,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
}

# Shears and translations along one axis share a kernel, so they are run as one group.
_SAME_KERNEL = {"translate_x": "shear_x", "translate_y": "shear_y"}

# By an operation's code, the code of its kernel. The last entry is for NOTHING, which is -1.
KERNELS = np.array([NAMES.index(_SAME_KERNEL.get(name, name)) for name in NAMES] + [NOTHING])


# ---- operations that move pixels


def affine(
    x: torch.Tensor,
    matrices: torch.Tensor,
    outside: torch.Tensor,
    interpolation: str,
    across: bool = True,
    down: bool = True,
) -> torch.Tensor:
    """Pillow's Image.transform(AFFINE) of images float32 [n, 3, H, W].

    `matrices` [n, 6] are those of `draws.affine_matrices`, float64 as Pillow computes. `outside`
    [1, 3, 1, 1] is the colour where no pixel of the image lies. `across` and `down` say along which
    axes pixels move at all; an axis that is left out costs nothing.
    """
    n, channels, h, w = x.shape
    matrix = matrices.T.reshape(2, 3, n, 1, 1)
    # Centres of the output's columns [W] and rows [H, 1].
    columns = torch.arange(w, device=x.device, dtype=matrices.dtype) + 0.5
    rows = (torch.arange(h, device=x.device, dtype=matrices.dtype) + 0.5)[:, None]

    # Along each axis, which source pixels an output pixel shows, in which shares, and whether the
    # place lies within the image at all.
    taps = [[(columns - 0.5).long()], [(rows - 0.5).long()]]
    shares: list[torch.Tensor | None] = [None, None]
    within = []
    for axis, (moves, side) in enumerate([(across, w), (down, h)]):
        if moves:
            a, b, c = matrix[axis]
            at = (a * columns).add(b * rows).add_(c)
            within.append((at >= 0) & (at < side))
            taps[axis], shares[axis] = _source_pixels(at, side, interpolation)

    # Pillow goes across first: one value for each row tap, then down between these.
    flat = x.view(n, channels, h * w)

    def pixels(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        at = (row * w + column).view(-1, 1, h * w).expand(n, channels, h * w)
        return flat.gather(2, at).view(n, channels, h, w).to(matrices.dtype)

    lines = [
        _interpolate([pixels(row, column) for column in taps[0]], shares[0]) for row in taps[1]
    ]
    moved = _interpolate(lines, shares[1]).clamp_(0, 255).floor_().float()

    inside = reduce(torch.logical_and, within)
    return torch.where(inside[:, None], moved, outside)


def _source_pixels(
    at: torch.Tensor, side: int, interpolation: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The source pixels around places `at` [n, H, W] along an axis of `side` pixels; changes `at`.

    Returns the pixels' indices, int64 [n, H, W] each: two for bilinear, four for bicubic; at the
    border the last pixel stands in for those beyond it. And how far each place lies on the way from
    the pixel before it to the next, in [0, 1): [n, 1, H, W].
    """
    offsets = (0, 1) if interpolation == "bilinear" else (-1, 0, 1, 2)
    below = at.sub_(0.5).floor()
    share = at.sub_(below)[:, None]
    taps = [(below + offset).clamp_(0, side - 1).long() for offset in offsets]
    return taps, share


def _interpolate(v: list[torch.Tensor], share: torch.Tensor | None) -> torch.Tensor:
    """Pillow's value between two samples (linear) or amid four (cubic, a = -1).

    One rounding at a time, in Pillow's order. Without a share there is only one sample.
    """
    if share is None:
        return v[0]
    if len(v) == 2:
        return (v[1] - v[0]).mul_(share).add_(v[0])
    first = -v[0] + v[2]
    second = 2 * (v[0] - v[1]) + v[2] - v[3]
    third = -v[0] + v[1] - v[2] + v[3]
    return third.mul_(share).add_(second).mul_(share).add_(first).mul_(share).add_(v[1])


def resize(
    x: torch.Tensor,
    size: tuple[int, int],
    interpolation: str,
    box: Floats | None = None,
    hflip: NDArray[np.bool_] | None = None,
    vflip: NDArray[np.bool_] | None = None,
) -> torch.Tensor:
    """Pillow's crop and resize (antialiased) to `size` (H, W), and flips, as two matrix products.

    Takes images of any dtype [n, 3, H, W], `box` [n, 4] (y0, x0, height, width in pixels; unset:
    all of each image) and flips [n]. Returns float32. The weights are fixed-point numbers, so every
    sum is exact, in any order and on any device.
    """
    n, channels, h, w = x.shape
    if box is None:
        box = np.array([[0.0, 0, h, w]])
    across = _weights(box[:, 1], box[:, 3], w, size[1], interpolation, hflip, x.device)
    down = _weights(box[:, 0], box[:, 2], h, size[0], interpolation, vflip, x.device)
    # Mixed precision would round the weights.
    with torch.autocast(x.device.type, enabled=False):
        # Pillow goes across first, and rounds in between.
        x = torch.matmul(x.to(across.dtype).view(n, channels * h, w), across.mT)
        x = x.add_(0.5).floor_().clamp_(0, 255)
        x = x.to(down.dtype).view(n, channels, h, size[1])
        return torch.matmul(down[:, None], x).add_(0.5).floor_().clamp_(0, 255).float()


def _weights(
    start: Floats,
    length: Floats,
    side: int,
    size: int,
    interpolation: str,
    flips: NDArray[np.bool_] | None,
    device: torch.device,
) -> torch.Tensor:
    """What each of `side` source pixels gives to each of `size` output pixels: [n, size, side].

    `start` and `length` [n] are the crop along this axis, in pixels. Each row sums to 1. Weights
    are multiples of 2**-22 in float64, as Pillow has them; float32 where 15 bits hold them exactly,
    which is when images of at most 512 pixels grow linearly to a power of two. mps has no float64
    and takes 15 bits always.
    """
    # Where each output pixel's centre lies in the source: [n, size].
    start = start[:, None]
    length = length[:, None]
    centre = start + (np.arange(size) + 0.5) * (length / size)
    if flips is not None:
        centre = np.where(flips[:, None], centre[:, ::-1], centre)
    pixel = torch.arange(side, device=device)

    # Linear growth to a power of two: the distances to the centres are the weights.
    grows = side <= 512 and side <= size <= 2**14
    power_of_two = size & (size - 1) == 0
    if interpolation == "bilinear" and grows and power_of_two:
        # At the crop's edge, the last pixel alone.
        at = np.clip(centre - 0.5, start, start + length - 1).astype(np.float32)
        return torch.relu_(1 - (to_device(at, device)[:, :, None] - pixel).abs_())

    # Distances from the centres, in units of the kernel's reach; shrinking takes a wider kernel.
    inverse = to_device(1 / np.maximum(length / size, 1), device)[:, :, None]
    t = (pixel - to_device(centre, device)[:, :, None]).add_(0.5).mul_(inverse).abs_()
    if interpolation == "bilinear":
        weights = torch.relu_(1 - t)
    else:
        # The cubic kernel of Keys 1981 with a = -0.5, within one pixel and within two.
        near = ((1.5 * t - 2.5) * t) * t + 1
        far = ((-0.5 * t + 2.5) * t - 4) * t + 2
        weights = torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))

    # Only pixels of the crop count; then fixed point, rounded half away from 0 as Pillow does.
    edges = to_device(np.concatenate([start, start + length], 1), device)[:, :, None]
    weights = weights * ((pixel >= edges[:, :1]) & (pixel < edges[:, 1:]))
    one = 2.0 ** (15 if device.type == "mps" else 22)
    weights = (weights / weights.sum(2, keepdim=True)).mul_(one)
    return torch.where(weights < 0, (weights - 0.5).ceil_(), (weights + 0.5).floor_()).div_(one)
