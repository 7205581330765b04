"""Which sample when: pure functions of (seed, epoch or step, sample index).

Nothing here has state. A random number is a hash of what it is for, so any process can compute any other's, a run goes
on at any step, and the number of processes changes nothing. The hash is the finaliser of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014), applied once per word.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# What a random number is for. The place in this list enters the hash: append, never reorder.
PURPOSES = (
    "permutation subset crop_area crop_ratio crop_y crop_x hflip vflip brightness contrast saturation erase erase_area "
    "erase_ratio erase_y erase_x mix mix_kind mix_lambda mix_y mix_x sample_seed dropout layer_operation layer_on "
    "layer_sign layer_magnitude layer_magnitude_angle jitter_order"
).split()


def random_bits(seed: int, purpose: str, *words: ArrayLike) -> NDArray[np.uint64]:
    """Hash (seed, purpose, *words) to 64 random bits; integer `words` broadcast against each other like arrays."""
    with np.errstate(over="ignore"):  # unsigned arithmetic modulo 2**64 is meant
        h = np.full((1,), seed, np.uint64)
        for word in (PURPOSES.index(purpose), *words):
            h = (
                h
                + np.asarray(word).astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
                + np.uint64(0x9E3779B97F4A7C15)
            )
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h


def uniform(seed: int, purpose: str, *words: ArrayLike) -> NDArray[np.float64]:
    """Random numbers in [0, 1) with 53 bits, one for each (seed, purpose, *words)."""
    return (random_bits(seed, purpose, *words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of epoch `epoch` over `n` samples: int64 [n]. The same on every machine and numpy version."""
    return np.argsort(random_bits(seed, "permutation", epoch, np.arange(n)), kind="stable")


def stratified_subset(labels: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """`n` sorted indices into `labels`, each class in proportion to its share (largest remainders get the odd ones)."""
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (n / len(labels))
    take = np.floor(exact).astype(int)
    take[np.argsort(take - exact, kind="stable")[: n - take.sum()]] += 1
    shuffled = np.argsort(random_bits(seed, "subset", np.arange(len(labels))), kind="stable")
    chosen = [shuffled[labels[shuffled] == c][:k] for c, k in zip(classes, take, strict=True)]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class Mix:
    """How the images of one global batch are mixed with their partners.

    `lam` is the share that an image itself keeps; `centre` is that of CutMix's pasted square (y, x) as fractions of the
    image's sides (what the square leaves of the image, in whole pixels, then replaces `lam`), or None for Mixup.
    """

    lam: float
    centre: tuple[float, float] | None = None


@dataclass(frozen=True)
class Order:
    """The plan of a run over `samples` images in global batches of `batch_size`, as seen by one of `world` processes.

    A global batch is cut into accumulation * world micro-batches of equal size; micro-batch `micro` of process `rank`
    is number micro * world + rank. The last, incomplete batch of an epoch is dropped, as timm does.
    """

    seed: int
    samples: int
    batch_size: int
    world: int = 1
    rank: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        assert self.batch_size % (self.world * self.accumulation) == 0, (
            "a global batch is cut into equal parts"
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return self.samples // self.batch_size

    @property
    def micro_batch_size(self) -> int:
        """Images that one process takes at once."""
        return self.batch_size // (self.world * self.accumulation)

    def arithmetic(self) -> str:
        """`256 = 2 processes x 64 images x 2 accumulation steps`."""
        processes = f"{self.world} process{'es' * (self.world > 1)}"
        steps = f"{self.accumulation} accumulation step{'s' * (self.accumulation > 1)}"
        return f"{self.batch_size} = {processes} x {self.micro_batch_size} images x {steps}"

    def positions(self, micro: int) -> NDArray[np.int64]:
        """Places in the global batch that this process takes in micro-batch `micro`: int64 [micro_batch_size]."""
        start = (micro * self.world + self.rank) * self.micro_batch_size
        return np.arange(start, start + self.micro_batch_size)

    def partners(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place each image is mixed with: its neighbour (0 with 1, 2 with 3, ...), the odd last with itself."""
        return np.minimum(positions ^ 1, self.batch_size - 1)

    def global_batch(self, step: int, epoch_order: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples of optimizer step `step` (from 0), given its epoch's permutation: int64 [batch_size]."""
        start = step % self.steps_per_epoch * self.batch_size
        return epoch_order[start : start + self.batch_size]

    def samples_of(self, step: int) -> NDArray[np.int64]:
        """The samples of optimizer step `step` alone (see `global_batch`): int64 [batch_size]."""
        return self.global_batch(
            step, permutation(self.seed, step // self.steps_per_epoch, self.samples)
        )

    def mix(self, step: int, mixup: float, cutmix: float, prob: float) -> Mix:
        """Mixing of step `step`: Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), Beta(a, a) per batch."""
        if not (mixup or cutmix) or uniform(self.seed, "mix", step)[0] >= prob:
            return Mix(1.0)
        cut = bool(cutmix) and (not mixup or uniform(self.seed, "mix_kind", step)[0] < 0.5)
        alpha, seed = cutmix if cut else mixup, int(random_bits(self.seed, "mix_lambda", step)[0])
        lam = np.random.Generator(np.random.PCG64(seed)).beta(alpha, alpha)
        y, x = (float(uniform(self.seed, f"mix_{axis}", step)[0]) for axis in "yx")
        return Mix(lam, (y, x) if cut else None)


class Rows(NamedTuple):
    """What a micro-batch is made of."""

    step: int
    epoch: int
    samples: NDArray[
        np.int64
    ]  # [n]: the m of the micro-batch itself, then partners that are not among them
    partners: NDArray[np.int64]  # [m]: for each of the m, where in `samples` its mixing partner is


def plan(order: Order, start: int, stop: int, mixing: bool) -> Iterator[Rows]:
    """The micro-batches of one process over optimizer steps start..stop-1."""
    epoch, epoch_order = -1, np.empty(0, np.int64)
    for step in range(start, stop):
        if step // order.steps_per_epoch != epoch:
            epoch = step // order.steps_per_epoch
            epoch_order = permutation(order.seed, epoch, order.samples)
        samples = order.global_batch(step, epoch_order)
        for micro in range(order.accumulation):
            own = order.positions(micro)
            partners = order.partners(own)
            places = np.concatenate([own, np.setdiff1d(partners, own)]) if mixing else own
            by_place = np.argsort(places)
            partners = by_place[np.searchsorted(places[by_place], partners)] if mixing else own
            yield Rows(step, epoch, samples[places], partners)
