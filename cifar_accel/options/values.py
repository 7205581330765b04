"""Values that an option writes as text: intervals, durations, keyword arguments."""

import ast
import contextlib
import functools
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from cifar_accel.errors import BadInput

# What may follow the number of --save-every, and the unit that it names.
INTERVAL_UNITS = {
    "epoch": "epoch",
    "epochs": "epoch",
    "step": "step",
    "steps": "step",
    "m": "minute",
    "min": "minute",
}


def parse_interval(text: str) -> tuple[int, str]:
    """`1epoch`, `500steps`, `10m` or `none` -> (count, "epoch" | "step" | "minute" | "never").

    Raises BadInput.
    """
    if text == "none":
        return 0, "never"
    # At most nine digits here and below: Python refuses to read numbers of thousands.
    match = re.fullmatch(r"(\d{1,9})(\D+)", text)
    if match and int(match[1]) > 0 and match[2] in INTERVAL_UNITS:
        return int(match[1]), INTERVAL_UNITS[match[2]]
    raise BadInput(
        f"--save-every {text}: write a number and a unit, as in 1epoch, 500steps or 10m, or none"
    )


@functools.cache
def parse_sizes(text: int | str) -> tuple[tuple[int, float], ...]:
    """`64:0.4,96:0.7,128` -> ((64, 0.4), (96, 0.7), (128, 1.0)); `96` -> ((96, 1.0),).

    Each size in pixels with the share of the steps at which it ends. Raises BadInput unless sizes
    and shares grow, and the last size alone goes on to the end.
    """
    sizes: list[tuple[int, float]] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"(\d{1,10})(?::(\d?\.?\d{1,6}))?", part)
        if match is None:
            raise BadInput(
                f"--image-size {text}: write one size, or sizes and the shares of the steps that "
                "they last to, as in 64:0.4,96:0.7,128"
            )
        sizes.append((int(match[1]), float(match[2] or 1)))
    # From the smallest size to the largest, from the first step to the last.
    grow = all(
        a < b for earlier, later in pairwise(sizes) for a, b in zip(earlier, later, strict=True)
    )
    if not grow or sizes[0][0] < 1 or sizes[0][1] <= 0 or sizes[-1][1] != 1:
        raise BadInput(
            f"--image-size {text}: sizes and shares must grow, the last size without a share, as "
            "in 64:0.4,96:0.7,128"
        )
    return tuple(sizes)


def check_sizes(text: str) -> str:
    """`text`, if it says sizes. Raises BadInput."""
    parse_sizes(text)
    return text


def parse_duration(text: str, flag: str = "--max-time") -> float:
    """`90m`, `2h`, `1h30m` or `45s` -> seconds. Raises BadInput, which names `flag`."""
    match = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", text)
    seconds = 0
    if match:
        hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = 3600 * hours + 60 * minutes + rest
    # An empty text matches too, and 30 years are a slip of the keyboard.
    if not 0 < seconds < 1e9:
        raise BadInput(f"{flag} {text}: write hours, minutes or seconds, as in 2h, 1h30m or 90m")
    return float(seconds)


def parse_keywords(pairs: Iterable[str]) -> dict[str, Any]:
    """`("patch_size=4", "act_layer=gelu")` -> keyword arguments of a timm model.

    A value is read as a Python literal, and where it is none it is the text itself. Raises BadInput
    for a word that is not name=value.
    """
    keywords: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise BadInput(f"--model-kwargs {pair}: must be name=value")
        keywords[name] = value
        # The last two are what Python raises for a literal that is nested too deeply.
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            keywords[name] = ast.literal_eval(value)
    return keywords
