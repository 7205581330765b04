"""timm's RandAugment policies, read from their strings. Imports nothing heavy.

RandAugment: Cubuk et al. 2020, with the rules of timm's auto_augment. `data/draws.py` draws from a
policy, and `data/pixels.py` holds the operations' pixels.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cifar_accel.errors import BadInput

# What a layer may do, in timm's order.
NAMES = (
    "autocontrast equalize invert rotate posterize solarize solarize_add color contrast brightness "
    "sharpness shear_x shear_y translate_x translate_y"
).split()

# One part of a policy, such as `m15` or `mstd0.5`: a key and its value, which may be a fraction, a
# whole number or a word.
_PART = re.compile(r"(mstd|p)(\d+\.?\d*|\.\d+|inf)|(mmax|m|n|inc)(\d+)|(t)(weights|3a|3aw)")

# The parts as an error message lists them.
_PARTS = "mM, nN, pP, mstdS, mmaxM, inc1, tweights, t3a, t3aw"


@dataclass(frozen=True)
class Policy:
    """What timm's `rand-...` string says."""

    # How strong an operation is, on a scale that usually ends at 10.
    magnitude: int = 10
    # Operations applied to an image, one after the other.
    layers: int = 2
    # Probability with which each of them is applied.
    prob: float = 0.5
    # Standard deviation of the magnitude; infinite: it is uniform from 0 to `magnitude`.
    std: float = 0.0
    # Magnitudes above are lowered to it.
    ceiling: int = 10
    # Whether every operation grows stronger with the magnitude; timm's older ones do not.
    increasing: bool = False
    # "weights": chosen by `draws.WEIGHTS` without repetition; "3a" and "3aw": sets of operations
    # that only the timm pipeline has; empty: all operations alike.
    choice: str = ""


# The field that each key sets, and how its value is read. Of mstd timm takes more than 100 to mean
# a uniform magnitude.
FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "m": ("magnitude", int),
    "n": ("layers", int),
    "p": ("prob", float),
    "mmax": ("ceiling", int),
    "inc": ("increasing", lambda value: int(value) == 1),
    "t": ("choice", str),
    "mstd": ("std", lambda value: float(value) if float(value) <= 100 else math.inf),
}


def read_policy(text: str) -> Policy:
    """Read `rand-m9-n2-mstd0.5-inc1`. Raises BadInput for a part that timm would not take."""
    # Part by part, each at most once and within its range.
    policy = Policy()
    seen = set()
    for part in text.split("-")[1:]:
        match = _PART.fullmatch(part)
        if match is None:
            raise BadInput(f"--aa {text}: '{part}' is not one of {_PARTS}")
        # The groups of the alternative that matched.
        key, value = [group for group in match.groups() if group is not None]
        if key in seen:
            raise BadInput(f"--aa {text}: '{part}' is given twice")
        seen.add(key)
        fault = _out_of_range(key, value)
        if fault:
            raise BadInput(f"--aa {text}: '{part}' must be {fault}")
        field, read = FIELDS[key]
        policy = replace(policy, **{field: read(value)})

    # What follows from the parts together.
    if policy.choice:
        # timm's sets with a name hold the increasing operations, whatever `inc` says.
        policy = replace(policy, increasing=True)
    if policy.choice == "weights" and policy.layers > len(NAMES):
        raise BadInput(f"--aa {text}: 'n{policy.layers}' is more than the {len(NAMES)} operations")
    return policy


def _out_of_range(key: str, value: str) -> str:
    """What the value of `key` must be, where it is not; otherwise an empty string."""
    if key in ("n", "mmax") and int(value) < 1:
        return "1 or greater"
    if key == "p" and not 0 < float(value) <= 1:
        return "above 0 and at most 1"
    if key == "inc" and int(value) > 1:
        return "0 or 1"
    return ""


def strength(policy: Policy) -> str:
    """What timm's ceiling makes of the magnitude, as an addition to the policy's name."""
    if policy.magnitude <= policy.ceiling:
        return ""
    return f" (m{policy.magnitude} acts as m{policy.ceiling}, timm's ceiling unless mmax raises it)"
