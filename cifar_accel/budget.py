"""Which sizes and how many epochs fit into a given time. Loads no torch.

The rule: of the sizes, each grown to from a smaller one and for as many epochs as fit, the one that
loses least by `points_lost`. What is left of the time moves steps from the first parts to the last.
"""

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

# A run's sizes in turn: the side in pixels, and the share of the steps at which it ends.
Parts = tuple[tuple[int, float], ...]

# Sides of the last size.
LAST_SIZES = (64, 96, 128, 160, 192, 224)
# The sides before it, as shares of it, and the shares of the steps at which they end.
Growth = tuple[tuple[float, float], ...]
GROWTH: Growth = ((0.5, 0.4), (0.75, 0.7), (1.0, 1.0))
# Of a model with batch norm, which a beginning at half the size costs more than it saves.
BATCH_NORM_GROWTH: Growth = ((0.75, 0.6), (1.0, 1.0))
# More give little, unless they are of few steps.
MOST_EPOCHS = 25
FEWEST_STEPS = 3000
# What is kept back of the time: on a shared machine the same steps took from 0.9 to 1.1 times as
# long within one hour (benchmarks/RESULTS.md).
RESERVE = 0.1


class TooShort(Exception):
    """Not even one epoch fits."""

    def __init__(self, seconds: float):
        super().__init__(f"it takes {seconds:.0f} s")
        # The shortest time in which one does.
        self.seconds = seconds


@dataclass(frozen=True)
class Speed:
    """Seconds by the side of the images in pixels, as measured at some sides."""

    # Of one optimizer step, of one evaluation, and of the first step.
    steps: dict[int, float]
    evaluations: dict[int, float]
    starts: dict[int, float] = field(default_factory=dict)

    def in_words(self) -> str:
        """Seconds of a step, by side."""
        return ", ".join(f"{seconds:.3g} s at {side} px" for side, seconds in self.steps.items())

    def step(self, side: int) -> float:
        """Seconds of an optimizer step at `side`."""
        return _at(self.steps, side)

    def evaluation(self, side: int) -> float:
        """Seconds of an evaluation at `side`."""
        return _at(self.evaluations, side)

    def epoch(self, parts: Parts, steps: int) -> float:
        """Seconds of an epoch of `steps`, mean over a run of these parts, and its evaluation."""
        begins = [0.0, *(end for _, end in parts)]
        lengths = [end - begin for begin, end in pairwise(begins)]
        sides = [side for side, _ in parts]
        step = sum(self.step(side) * part for side, part in zip(sides, lengths, strict=True))
        return steps * step + self.evaluation(sides[-1])


def _at(seconds: dict[int, float], side: int) -> float:
    """Seconds at `side`, linear in pixels: between its neighbours, or beyond the last two."""
    if side in seconds:
        return seconds[side]
    sides = sorted(seconds)
    if len(sides) == 1:
        return seconds[sides[0]] * (side / sides[0]) ** 2
    place = min(max(bisect(sides, side), 1), len(sides) - 1)
    low, high = sides[place - 1 : place + 1]
    # What was measured is noisy: larger images never take less.
    slope = max(0.0, seconds[high] - seconds[low]) / (high**2 - low**2)
    # A small image takes no less than a quarter of the least that was measured.
    return max(seconds[low] + slope * (side**2 - low**2), seconds[sides[0]] / 4)


@dataclass(frozen=True)
class Fitted:
    """Sizes, epochs and the seconds that they take."""

    parts: Parts
    epochs: int
    seconds: float

    @property
    def lost(self) -> float:
        """Points of accuracy that the size and the number of epochs cost, roughly."""
        return points_lost(self.parts[-1][0], self.epochs)


def one_size(side: int) -> Parts:
    """The parts of a run at one size."""
    return ((side, 1.0),)


def text_of(parts: Parts) -> int | str:
    """The parts as --image-size says them."""
    *firsts, (last, _) = parts
    words = [f"{side}:{end:.3g}" for side, end in firsts]
    return ",".join([*words, str(last)]) if firsts else last


def points_lost(side: int, epochs: int) -> float:
    """Points of accuracy below those of large images and many epochs (docs/accuracy.md)."""
    return 12 * (64 / side) ** 2 + 17 / (epochs + 0.5)


def most_epochs(steps_per_epoch: int) -> int:
    """The most epochs that are planned."""
    return max(MOST_EPOCHS, math.ceil(FEWEST_STEPS / steps_per_epoch))


def growing_to(last: int, growth: Growth = GROWTH) -> Parts:
    """The parts of a run that grows to `last` pixels; their sides are multiples of 16."""
    parts = {max(32, 16 * round(share * last / 16)): end for share, end in growth}
    return tuple(parts.items())


def fit_choices(
    seconds: float, speed: Speed, steps_per_epoch: int, choices: Sequence[Parts], epochs: int = 0
) -> list[Fitted]:
    """What fits into `seconds` with each of `choices`, best first; only those that fit at all.

    `epochs` may be chosen already. Raises TooShort where none of them fits.
    """
    room = seconds * (1 - RESERVE)
    fitted = []
    for parts in choices:
        an_epoch = speed.epoch(parts, steps_per_epoch)
        most = min(epochs or most_epochs(steps_per_epoch), int(room / an_epoch))
        if most >= max(1, epochs):
            fitted.append(Fitted(parts, most, most * an_epoch))
    if not fitted:
        shortest = min(speed.epoch(parts, steps_per_epoch) for parts in choices) * max(1, epochs)
        raise TooShort(shortest / (1 - RESERVE))
    return sorted(fitted, key=lambda choice: choice.lost)


def lengthened(fitted: Fitted, seconds: float, speed: Speed, steps_per_epoch: int) -> Fitted:
    """`fitted` with a longer last part, so that it takes `seconds`; the first part yields first."""
    *firsts, (last, _) = fitted.parts
    left = seconds * (1 - RESERVE) - fitted.seconds
    taken = fitted.seconds + left
    # The share of the steps that goes to the last part.
    moved = begin = 0.0
    for side, end in firsts:
        # What the run costs more for a share of its steps at the last size in place of this one.
        cost = fitted.epochs * steps_per_epoch * (speed.step(last) - speed.step(side))
        length = end - begin
        share = length if cost * length <= left else left / cost
        moved += share
        left -= cost * share
        begin = end
    kept = [(side, round(end - moved, 3)) for side, end in firsts if end - moved > 0.005]
    return Fitted((*kept, (last, 1.0)), fitted.epochs, taken - left)
