"""Programs: which operation with which argument in each layer of each sample.

A program stands for RandAugment or colour jitter. It is drawn on the host, in numpy, from (seed,
epoch, sample index), so the host knows the size of every sub-batch. `pixels.run_program` runs it.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cifar_accel.data.order import uniform
from cifar_accel.options.policy import NAMES, Policy

Floats = NDArray[np.float64]

# The code of a layer that leaves its sample alone. The other codes are places in NAMES.
NOTHING = -1

# The operations that move pixels: whether across (along x), and whether down (along y). Their
# argument is a matrix.
MOVES = {
    "rotate": (True, True),
    "shear_x": (True, False),
    "shear_y": (False, True),
    "translate_x": (True, False),
    "translate_y": (False, True),
}

# How often timm's `tweights` chooses each operation, in the order of NAMES.
WEIGHTS = np.array([0.25, 0.05, 0.05, 3, 0.05, 0.05, 0.05, 0.25, 0.05, 0.05, 0.25, 2, 2, 1, 1])


@dataclass(frozen=True)
class Program:
    """For each of n samples and each layer, the operation and its argument."""

    # [n, layers]: places in NAMES, or NOTHING.
    operations: NDArray[np.int64]
    # [n, layers, 6]: for an operation that moves pixels, a matrix by `affine_matrices`; for
    # the others, the first number is the argument.
    arguments: Floats


def draw_policy(
    policy: Policy,
    seed: int,
    epoch: NDArray[np.int64],
    index: NDArray[np.int64],
    size: tuple[int, int],
) -> Program:
    """Draw RandAugment (Cubuk et al. 2020) by timm's rules.

    `index` are the samples, `epoch` the epoch of each (int64 [n]); `size` is (H, W) of the images.
    """
    assert policy.choice in ("", "weights"), "the other choices are for the timm pipeline"
    layer = np.arange(policy.layers)
    epoch = epoch[:, None]
    index = index[:, None]

    def draw(purpose: str) -> Floats:
        """One random number for each sample and layer: [n, layers]."""
        return uniform(seed, purpose, epoch, index, layer)

    # Which operations: [n, layers].
    if policy.choice == "weights":
        # Without repetition. Operations sorted by exponential times are successive draws without
        # replacement (Efraimidis and Spirakis 2006).
        numbers = uniform(seed, "layer_operation", epoch, index, np.arange(len(NAMES)))
        times = -np.log1p(-numbers) / WEIGHTS
        operations = np.argsort(times, 1)[:, : policy.layers]
    else:
        operations = np.floor(draw("layer_operation") * len(NAMES)).astype(np.int64)

    # How strong, and in which direction: [n, layers].
    magnitude = np.full(operations.shape, float(policy.magnitude))
    if policy.std == np.inf:
        magnitude *= draw("layer_magnitude")
    elif policy.std:
        # A normal deviation from two uniform numbers (Box and Muller 1958).
        radius = np.sqrt(-2 * np.log1p(-draw("layer_magnitude")))
        magnitude += policy.std * radius * np.cos(2 * np.pi * draw("layer_magnitude_angle"))
    level = np.clip(magnitude, 0, policy.ceiling) / 10
    sign = np.where(draw("layer_sign") < 0.5, 1.0, -1.0)

    # Which layers are left out.
    if policy.prob < 1:
        operations = np.where(draw("layer_on") < policy.prob, operations, NOTHING)

    # The arguments, one operation after the other.
    arguments = np.zeros((*operations.shape, 6))
    for code, name in enumerate(NAMES):
        at = np.nonzero(operations == code)
        if not len(at[0]):
            continue
        values = argument(name, level[at], sign[at], policy.increasing)
        if name in MOVES:
            arguments[at] = affine_matrices(name, values, size)
        else:
            arguments[at[0], at[1], 0] = values
    return Program(operations, arguments)


def draw_jitter(
    seed: int, epoch: NDArray[np.int64], index: NDArray[np.int64], amount: float
) -> Program:
    """Draw torchvision's ColorJitter: brightness, contrast and saturation in random order.

    Factors are 1 ± `amount`. `index` are the samples and `epoch` the epoch of each, both int64 [n].
    """
    # The order: a row of `order` holds 0, 1 and 2.
    orders = np.array(list(itertools.permutations(range(3))))
    which = np.floor(uniform(seed, "jitter_order", epoch, index) * len(orders)).astype(np.int64)
    order = orders[which]

    # The factors, drawn by operation and then put into that order: [n, 3].
    purposes = ("brightness", "contrast", "saturation")
    drawn = np.stack([uniform(seed, purpose, epoch, index) for purpose in purposes], 1)
    least = max(0.0, 1 - amount)
    factors = least + drawn * (1 + amount - least)
    arguments = np.zeros((len(index), 3, 6))
    arguments[:, :, 0] = np.take_along_axis(factors, order, 1)

    # RandAugment's name for saturation is color.
    codes = np.array([NAMES.index(name) for name in ("brightness", "contrast", "color")])
    return Program(codes[order], arguments)


def argument(name: str, level: Floats, sign: Floats, increasing: bool) -> Floats:
    """timm's argument of operation `name` at `level` (magnitude / 10) with a random `sign`.

    All are float64 [n]. Degrees for rotate, a slope for shear, a share of the side for translate; a
    threshold, a sum or a number of bits for the point operations; a factor for color, contrast,
    brightness and sharpness; 0 for those that take no argument.
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
        if increasing:
            return np.maximum(0.1, 1 + sign * (level * 0.9))
        return level * 1.8 + 0.1
    if name == "rotate":
        return level * 30.0 * sign
    if name in ("shear_x", "shear_y"):
        return level * 0.3 * sign
    if name in ("translate_x", "translate_y"):
        return level * 0.45 * sign
    return np.zeros_like(level)


def affine_matrices(name: str, values: Floats, size: tuple[int, int]) -> Floats:
    """Matrices [n, 6] (a, b, c, d, e, f) of operation `name` with arguments `values` [n].

    Output pixel (x, y) shows the input at (ax + by + c, dx + ey + f), in pixels; `size` is (H, W).
    """
    h, w = size
    matrix = np.tile([1.0, 0, 0, 0, 1, 0], (len(values), 1))
    if name == "shear_x":
        matrix[:, 1] = values
    elif name == "shear_y":
        matrix[:, 3] = values
    elif name == "translate_x":
        matrix[:, 2] = values * w
    elif name == "translate_y":
        matrix[:, 5] = values * h
    else:
        # A rotation about the centre, which Pillow rounds to 15 digits.
        angle = -np.radians(values % 360.0)
        cos = np.round(np.cos(angle), 15)
        sin = np.round(np.sin(angle), 15)
        matrix[:, 0] = cos
        matrix[:, 1] = sin
        matrix[:, 2] = cos * -(w / 2) + sin * -(h / 2) + w / 2
        matrix[:, 3] = -sin
        matrix[:, 4] = cos
        matrix[:, 5] = -sin * -(w / 2) + cos * -(h / 2) + h / 2
    return matrix
