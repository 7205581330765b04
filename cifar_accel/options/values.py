"""Values that an option writes as text: intervals, durations, keyword arguments."""

import re
from collections.abc import Iterable
from typing import Any

from cifar_accel.errors import BadInput


def parse_interval(text: str) -> tuple[int, str]:
    """`1epoch`, `500steps`, `10m` or `none` -> (count, "epoch" | "step" | "minute" | "never"). Raises BadInput."""
    if text == "none":
        return 0, "never"
    for unit, endings in (
        ("epoch", ("epochs", "epoch")),
        ("step", ("steps", "step")),
        ("minute", ("m", "min")),
    ):
        for ending in endings:
            count = text.removesuffix(ending)
            if count != text and count.isdecimal() and int(count) > 0:
                return int(count), unit
    raise BadInput(
        f"--save-every {text}: write a number and a unit, as in 1epoch, 500steps or 10m, or none"
    )


def parse_duration(text: str) -> float:
    """`90m`, `2h`, `1h30m` or `45s` -> seconds. Raises BadInput."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    seconds = (
        sum(int(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True))
        if match
        else 0
    )
    if not 0 < seconds < 1e9:
        raise BadInput(
            f"--max-time {text}: write hours, minutes or seconds, as in 2h, 1h30m or 90m"
        )
    return float(seconds)


def parse_keywords(pairs: Iterable[str]) -> dict[str, Any]:
    """`("patch_size=4", "act_layer=gelu")` -> keyword arguments; values read as Python literals, else as text."""
    import ast

    keywords: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise BadInput(f"--model-kwargs {pair}: must be name=value")
        try:
            keywords[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            keywords[name] = value
    return keywords
