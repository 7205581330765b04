"""Pillow's image operations on whole batches, on any device, pixel for pixel.

Images are float32 [n, 3, H, W] that hold whole numbers from 0 to 255, and each operation rounds as Pillow rounds. All
sums are of numbers that float32 (or float64, where Pillow takes double) holds exactly, or follow Pillow's order one
rounding at a time. So a sample's pixels depend neither on the batch around it nor on the device, and the tests compare
with Pillow itself.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cifar_accel.data.draws import NOTHING, Floats, Program
from cifar_accel.options.policy import NAMES


def to_device(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """`array` on `device`; from pinned memory to CUDA, so that the host does not wait. mps gets float32 for float64."""
    tensor = torch.from_numpy(array)
    if device.type == "mps" and tensor.dtype == torch.float64:
        tensor = tensor.float()
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def run_program(
    images: torch.Tensor, program: Program, fill: tuple[int, ...], interpolation: str
) -> torch.Tensor:
    """Apply `program` to its n images, layer by layer, in place. `fill` is the colour outside (0..255 a channel)."""
    kernels = KERNELS[program.operations]
    groups = [  # one sub-batch for each layer and kernel
        (code, group := np.flatnonzero(kernels[:, layer] == code), program.arguments[group, layer])
        for layer in range(kernels.shape[1])
        for code in np.unique(kernels[:, layer])
        if code != NOTHING
    ]
    if not groups:
        return images
    every_row = to_device(np.concatenate([members for _, members, _ in groups]), images.device)
    every_argument = to_device(
        np.concatenate([arguments for _, _, arguments in groups]), images.device
    )
    start = 0
    for code, members, _ in groups:
        place = slice(start, start + len(members))
        rows, arguments = every_row[place], every_argument[place]
        chosen = images.index_select(0, rows)
        if NAMES[code] in OPERATIONS:
            changed = OPERATIONS[NAMES[code]](chosen, arguments[:, :1, None, None])
        else:
            changed = affine(chosen, arguments, fill, interpolation, *MOVES[NAMES[code]])
        images.index_copy_(0, rows, changed)
        start += len(members)
    return images


# ---- operations on colours: images float32 [n, 3, H, W] and one argument a sample [n, 1, 1, 1]


def blend(start: torch.Tensor, end: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Pillow's Image.blend: from `start` towards (and beyond) `end`, in float32, cut off and truncated."""
    return (end - start).mul_(share.float()).add_(start).clamp_(0, 255).floor_()


def grey(x: torch.Tensor) -> torch.Tensor:
    """Pillow's luma, in 16-bit fixed point (all sums below 2**24)."""
    red, green, blue = x.split(1, 1)
    return (red * 19595 + green * 38470 + blue * 7471).add_(32768).mul_(2.0**-16).floor_()


def brightness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageEnhance.Brightness."""
    return blend(x.new_zeros(()), x, factor)


def contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageEnhance.Contrast: away from the mean grey, rounded."""
    pixels = x.shape[2] * x.shape[3]
    total = grey(x).sum((2, 3), keepdim=True, dtype=torch.int64)
    return blend(((2 * total + pixels) // (2 * pixels)).float(), x, factor)


def color(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageEnhance.Color: away from its own grey."""
    return blend(grey(x), x, factor)


def sharpness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageEnhance.Sharpness: away from a 3x3 smoothing that leaves the border as it is."""
    smooth = x.clone()
    if min(x.shape[2:]) > 2:
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


def autocontrast(x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageOps.autocontrast: each channel stretched to 0..255; a flat one is left as it is."""
    low, high = (
        x.amin((2, 3), keepdim=True).to(unused.dtype),
        x.amax((2, 3), keepdim=True).to(unused.dtype),
    )
    scale = torch.div(
        torch.full_like(low, 255), (high - low).clamp_(min=1)
    )  # 255 / x would take the reciprocal
    stretched = (x * scale).add_(-low * scale).clamp_(0, 255).floor_().float()
    return torch.where(high > low, stretched, x)


def equalize(x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageOps.equalize: each channel through its own cumulated histogram."""
    n, channels, h, w = x.shape
    values = x.reshape(n * channels, h * w).long()
    counts = torch.zeros(n * channels, 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, values, torch.ones_like(values))
    brightest = counts.gather(1, values.amax(1, keepdim=True))
    step = (h * w - brightest) // 255
    before = counts.cumsum(1) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, table.gather(1, values), values).view_as(x).float()


# The operations on colours by name; `affine` below is all the others.
OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": solarize,  # its argument, the threshold, is 0
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
}


# The others: whether they move pixels across and down.
MOVES = {
    "rotate": (True, True),
    "shear_x": (True, False),
    "translate_x": (True, False),
    "shear_y": (False, True),
    "translate_y": (False, True),
}


# Codes in NAMES -> the code whose kernel does it: what moves pixels the same ways goes in one sub-batch. NOTHING is -1,
# the last place.
_SAME = {"translate_x": "shear_x", "translate_y": "shear_y"}


KERNELS = np.array([NAMES.index(_SAME.get(name, name)) for name in NAMES] + [NOTHING])


# ---- operations that move pixels


def affine(
    x: torch.Tensor,
    matrices: torch.Tensor,
    fill: tuple[int, ...],
    interpolation: str,
    across: bool = True,
    down: bool = True,
) -> torch.Tensor:
    """Pillow's Image.transform(AFFINE) with matrices [n, 6] (float64, as Pillow computes); outside it shows `fill`.

    `across` and `down` say in which directions pixels move at all; one that is left out costs nothing.
    """
    n, channels, h, w = x.shape
    matrix = matrices.T.reshape(2, 3, n, 1, 1)
    columns = torch.arange(w, device=x.device, dtype=matrices.dtype) + 0.5
    rows = (torch.arange(h, device=x.device, dtype=matrices.dtype) + 0.5)[:, None]
    taps = (0, 1) if interpolation == "bilinear" else (-1, 0, 1, 2)
    inside: Any = None
    shares: list[torch.Tensor | None] = []
    places: list[list[torch.Tensor]] = []
    for moves, (a, b, c), side, still in (
        (across, matrix[0], w, columns),
        (down, matrix[1], h, rows),
    ):
        if not moves:
            shares.append(None)
            places.append([(still - 0.5).long()])
            continue
        at = (a * columns).add(b * rows).add_(c)
        within = (at >= 0) & (at < side)
        inside = within if inside is None else inside & within
        low = at.sub_(0.5).floor()
        shares.append(at.sub_(low)[:, None])
        places.append([(low + tap).clamp_(0, side - 1).long() for tap in taps])
    flat = x.view(n, channels, h * w)

    def pixels(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        at = (row * w + column).view(-1, 1, h * w).expand(n, channels, h * w)
        return flat.gather(2, at).view(n, channels, h, w).to(matrices.dtype)

    lines = [
        _between([pixels(row, column) for column in places[0]], shares[0]) for row in places[1]
    ]
    moved = _between(lines, shares[1]).clamp_(0, 255).floor_().float()
    return torch.where(
        inside[:, None], moved, torch.tensor(fill, dtype=x.dtype).to(x.device).view(1, -1, 1, 1)
    )


def _between(v: list[torch.Tensor], share: torch.Tensor | None) -> torch.Tensor:
    """Pillow's value between two samples (linear) or amid four (cubic, a = -1), one rounding at a time."""
    if share is None:
        return v[0]
    if len(v) == 2:
        return (v[1] - v[0]).mul_(share).add_(v[0])
    first, second, third = -v[0] + v[2], 2 * (v[0] - v[1]) + v[2] - v[3], -v[0] + v[1] - v[2] + v[3]
    return third.mul_(share).add_(second).mul_(share).add_(first).mul_(share).add_(v[1])


def resize(
    x: torch.Tensor,
    size: tuple[int, int],
    interpolation: str,
    box: Floats | None = None,
    hflip: NDArray[np.bool_] | None = None,
    vflip: NDArray[np.bool_] | None = None,
) -> torch.Tensor:
    """Pillow's crop and resize (antialiased) to `size` (H, W), and flips, as two products with matrices of weights.

    Takes images of any dtype [n, 3, H, W], `box` [n, 4] (y0, x0, height, width in pixels; unset: all of each image) and
    flips [n]. Every sum of pixels and fixed-point weights is exact, in any order and on any device.
    """
    box = np.array([[0.0, 0, x.shape[2], x.shape[3]]]) if box is None else box
    n, channels, h, w = x.shape
    across = _weights(box[:, 1], box[:, 3], w, size[1], interpolation, hflip, x.device)
    down = _weights(box[:, 0], box[:, 2], h, size[0], interpolation, vflip, x.device)
    with torch.autocast(x.device.type, enabled=False):
        x = torch.matmul(
            x.to(across.dtype).view(n, channels * h, w), across.mT
        )  # Pillow goes across first, and rounds
        x = x.add_(0.5).floor_().clamp_(0, 255).to(down.dtype).view(n, channels, h, size[1])
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
    """What each of `side` source pixels gives to each of `size` output pixels: [n, size, side], rows sum to 1.

    Multiples of 2**-22 in float64, as Pillow has them; in float32 where 15 bits hold them exactly, which is when images
    of at most 512 pixels grow linearly to a power of two. mps has no float64 and takes 15 bits always.
    """
    start, length = start[:, None], length[:, None]
    centre = start + (np.arange(size) + 0.5) * (length / size)
    if flips is not None:
        centre = np.where(flips[:, None], centre[:, ::-1], centre)
    pixel = torch.arange(side, device=device)
    if (
        interpolation == "bilinear"
        and side <= size <= 2**14
        and side <= 512
        and not size & (size - 1)
    ):
        at = np.clip(centre - 0.5, start, start + length - 1).astype(
            np.float32
        )  # at the edge, the last pixel alone
        return torch.relu_(1 - (to_device(at, device)[:, :, None] - pixel).abs_())
    one = 2.0 ** (15 if device.type == "mps" else 22)
    edges = to_device(np.concatenate([start, start + length], 1), device)[:, :, None]
    inverse = to_device(1 / np.maximum(length / size, 1), device)[:, :, None]
    t = (pixel - to_device(centre, device)[:, :, None]).add_(0.5).mul_(inverse).abs_()
    if interpolation == "bilinear":
        weights = torch.relu_(1 - t)
    else:  # Keys 1981, a = -0.5
        near, far = ((1.5 * t - 2.5) * t) * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
        weights = torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
    weights = weights * ((pixel >= edges[:, :1]) & (pixel < edges[:, 1:]))
    weights = (weights / weights.sum(2, keepdim=True)).mul_(one)
    return torch.where(weights < 0, (weights - 0.5).ceil_(), (weights + 0.5).floor_()).div_(one)
