"""Programs: which operation with which argument in each layer of each sample, for RandAugment and colour jitter.

Drawn on the host in numpy from (seed, epoch, sample index), so the host knows the size of every sub-batch.
`operations.py` runs them.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cifar_accel.data.order import uniform
from cifar_accel.options.policy import NAMES, Policy

Floats = NDArray[np.float64]


NOTHING = -1  # the code of a layer that leaves its sample alone; the others are places in NAMES


# timm's `tweights`: how often each is chosen.
WEIGHTS = np.array([0.25, 0.05, 0.05, 3, 0.05, 0.05, 0.05, 0.25, 0.05, 0.05, 0.25, 2, 2, 1, 1])


@dataclass(frozen=True)
class Program:
    """For n samples and their layers: the operation and its arguments."""

    operations: NDArray[np.int64]  # [n, layers]: places in NAMES, or NOTHING
    arguments: Floats  # [n, layers, 6]: a matrix for what moves pixels (see `affine`), else the first alone counts


def draw_policy(
    policy: Policy,
    seed: int,
    epoch: NDArray[np.int64],
    index: NDArray[np.int64],
    size: tuple[int, int],
) -> Program:
    """Programs of samples `index` (int64 [n]) in epochs `epoch` (int64 [n]) for images of `size` (H, W)."""
    assert policy.choice in ("", "weights")
    layer, epoch, index = np.arange(policy.layers), epoch[:, None], index[:, None]

    def each(purpose: str) -> Floats:
        return uniform(seed, purpose, epoch, index, layer)

    if (
        policy.choice
    ):  # successive draws without replacement: the order of exponential times (Efraimidis 2006)
        times = (
            -np.log1p(-uniform(seed, "layer_operation", epoch, index, np.arange(len(NAMES))))
            / WEIGHTS
        )
        operations = np.argsort(times, 1)[:, : policy.layers]
    else:
        operations = np.floor(each("layer_operation") * len(NAMES)).astype(np.int64)
    magnitude = np.full(operations.shape, float(policy.magnitude))
    if policy.std == np.inf:
        magnitude *= each("layer_magnitude")
    elif policy.std:  # Box and Muller 1958
        radius = np.sqrt(-2 * np.log1p(-each("layer_magnitude")))
        magnitude += policy.std * radius * np.cos(2 * np.pi * each("layer_magnitude_angle"))
    level = np.clip(magnitude, 0, policy.ceiling) / 10
    sign = np.where(each("layer_sign") < 0.5, 1.0, -1.0)
    if policy.prob < 1:
        operations = np.where(each("layer_on") < policy.prob, operations, NOTHING)
    arguments = np.zeros((*operations.shape, 6))
    for code, name in enumerate(NAMES):
        at = np.nonzero(operations == code)
        if len(at[0]):
            values = argument(name, level[at], sign[at], policy.increasing)
            if name.startswith(("rotate", "shear", "translate")):
                arguments[at] = affine(name, values, size)
            else:
                arguments[at[0], at[1], 0] = values
    return Program(operations, arguments)


def draw_jitter(
    seed: int, epoch: NDArray[np.int64], index: NDArray[np.int64], amount: float
) -> Program:
    """torchvision's ColorJitter: brightness, contrast and saturation, in random order, by factors 1 ± `amount`."""
    orders = np.array(list(itertools.permutations(range(3))))
    order = orders[
        np.floor(uniform(seed, "jitter_order", epoch, index) * len(orders)).astype(np.int64)
    ]
    drawn = np.stack(
        [uniform(seed, p, epoch, index) for p in ("brightness", "contrast", "saturation")], 1
    )
    least = max(0.0, 1 - amount)
    factors = least + drawn * (1 + amount - least)
    arguments = np.zeros((len(index), 3, 6))
    arguments[:, :, 0] = np.take_along_axis(factors, order, 1)
    return Program(
        np.array([NAMES.index(n) for n in ("brightness", "contrast", "color")])[order], arguments
    )


def argument(name: str, level: Floats, sign: Floats, increasing: bool) -> Floats:
    """timm's argument of operation `name` at `level` (magnitude / 10) with random `sign`; all float64 [n].

    Degrees for rotate, a slope for shear, a share of the side for translate, a threshold, a sum or a number of bits for
    the point operations, a factor for color, contrast, brightness and sharpness, 0 for those that take none.
    """
    if name == "posterize":
        bits = np.trunc(level * 4)
        return 4 - bits if increasing else bits
    if name == "solarize":
        threshold = np.minimum(256, np.trunc(level * 256))
        return 256 - threshold if increasing else threshold
    if name == "solarize_add":
        return np.minimum(128, np.trunc(level * 110))
    if name in ("color", "contrast", "brightness", "sharpness"):
        return np.maximum(0.1, 1 + sign * (level * 0.9)) if increasing else level * 1.8 + 0.1
    reach = {"rotate": 30.0, "shear": 0.3, "translate": 0.45}.get(
        name.removesuffix("_x").removesuffix("_y"), 0.0
    )
    return level * reach * sign


def affine(name: str, values: Floats, size: tuple[int, int]) -> Floats:
    """Matrices [n, 6] (a, b, c, d, e, f): output pixel (x, y) shows the input at (ax + by + c, dx + ey + f)."""
    h, w = size
    matrix = np.tile([1.0, 0, 0, 0, 1, 0], (len(values), 1))
    if name == "rotate":  # about the centre; PIL rounds to 15 digits
        angle = -np.radians(values % 360.0)
        cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
        matrix[:, 0], matrix[:, 1], matrix[:, 3], matrix[:, 4] = cos, sin, -sin, cos
        matrix[:, 2] = cos * -(w / 2) + sin * -(h / 2) + w / 2
        matrix[:, 5] = -sin * -(w / 2) + cos * -(h / 2) + h / 2
    else:
        place = {"shear_x": 1, "shear_y": 3, "translate_x": 2, "translate_y": 5}[name]
        matrix[:, place] = values * {"translate_x": w, "translate_y": h}.get(name, 1)
    return matrix
