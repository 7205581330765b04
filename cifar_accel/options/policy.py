"""timm's RandAugment policies, as read from their strings. Imports nothing heavy: `config.py` checks `--aa` with it.

RandAugment: Cubuk et al. 2020, with the rules of timm's auto_augment. `programs.py` draws from a policy, and
`operations.py` holds the operations' pixels.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from cifar_accel.errors import BadInput

# What a layer may do, in timm's order.
NAMES = (
    "autocontrast equalize invert rotate posterize solarize solarize_add color contrast brightness sharpness "
    "shear_x shear_y translate_x translate_y"
).split()


@dataclass(frozen=True)
class Policy:
    """timm's `rand-...` string: `layers` operations, each applied with probability `prob` at `magnitude`."""

    magnitude: int = 10
    layers: int = 2
    prob: float = 0.5
    std: float = 0.0  # of the magnitude; infinite: uniform from 0 to the magnitude
    ceiling: int = 10  # magnitudes above are lowered to it
    increasing: bool = False  # whether every operation grows stronger with the magnitude
    choice: str = (
        ""  # "weights": chosen by WEIGHTS, without repetition; "3a", "3aw": sets that only timm has
    )


def read_policy(text: str) -> Policy:
    """Read `rand-m9-n2-mstd0.5-inc1`. Raises BadInput naming the part that timm refuses or would pass over."""
    kind, *parts = text.split("-")
    if kind != "rand":
        raise BadInput(
            f"--aa {text}: '{kind}' is no RandAugment; the device pipeline has rand-... policies"
        )
    policy, seen = Policy(), set()
    fields = {
        "m": "magnitude",
        "n": "layers",
        "p": "prob",
        "mstd": "std",
        "mmax": "ceiling",
        "inc": "increasing",
    }
    for part in parts:
        match = re.fullmatch(
            r"(mstd|p)(\d+\.?\d*|\.\d+|inf)|(mmax|m|n|inc)(\d+)|(t)(weights|3a|3aw)", part
        )
        key, value = [group for group in match.groups() if group] if match else ("", "")
        if key in seen or not match:
            wrong = (
                "is given twice"
                if match
                else "is not one of mM, nN, pP, mstdS, mmaxM, inc1, tweights, t3a, t3aw"
            )
            raise BadInput(f"--aa {text}: '{part}' {wrong}")
        seen.add(key)
        if key == "t":
            policy = replace(policy, choice=value, increasing=True)
            continue
        number = float(value)
        if {"n": number < 1, "p": not 0 < number <= 1, "mmax": number < 1, "inc": number > 1}.get(
            key, False
        ):
            low = {"inc": "0 or 1", "p": "above 0 and at most 1"}.get(key, "1 or greater")
            raise BadInput(f"--aa {text}: '{part}' must be {low}")
        if key == "mstd":
            number = float("inf") if number > 100 else number  # timm's word for a uniform magnitude
        kinds: dict[str, Any] = {"p": float, "mstd": float, "inc": bool}
        policy = replace(policy, **{fields[key]: kinds.get(key, int)(number)})
    if "t" in seen:
        policy = replace(policy, increasing=True)
    if policy.choice == "weights" and policy.layers > len(NAMES):
        raise BadInput(
            f"--aa {text}: 'n{policy.layers}' is more than the {len(NAMES)} operations to choose from"
        )
    return policy


def strength(policy: Policy) -> str:
    """What the magnitude comes to, as an addition to the policy's name, where timm's ceiling lowers it."""
    if policy.magnitude <= policy.ceiling:
        return ""
    return f" (m{policy.magnitude} acts as m{policy.ceiling}, timm's ceiling unless mmax raises it)"
