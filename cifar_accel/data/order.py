"""Which sample when: pure functions of (seed, epoch or step, sample index).

Nothing here has state. A random number is a hash of what it is for. So any process can compute what
any other draws, a run can go on at any step, and the number of processes changes nothing. The hash
is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014), applied once per word.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# What a random number is for. A name's place in this list enters the hash: append, never reorder.
PURPOSES = (
    "permutation subset crop_area crop_ratio crop_y crop_x hflip vflip brightness contrast "
    "saturation erase erase_area erase_ratio erase_y erase_x mix mix_kind mix_lambda mix_y mix_x "
    "sample_seed dropout layer_operation layer_on layer_sign layer_magnitude "
    "layer_magnitude_angle jitter_order"
).split()


# ---- random numbers


def random_bits(seed: int, purpose: str, *words: ArrayLike) -> NDArray[np.uint64]:
    """Hash (seed, purpose, *words) to 64 random bits; integer `words` broadcast like arrays."""
    # Overflow is meant: the arithmetic is modulo 2**64.
    with np.errstate(over="ignore"):
        h = np.full((1,), seed, np.uint64)
        for word in (PURPOSES.index(purpose), *words):
            # The word enters with a multiplier of its own, or (1, 2) and (2, 1) could collide.
            entering = np.asarray(word).astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
            h = h + entering + np.uint64(0x9E3779B97F4A7C15)
            # SplitMix64's finaliser.
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h


def uniform(seed: int, purpose: str, *words: ArrayLike) -> NDArray[np.float64]:
    """Random numbers in [0, 1) with 53 bits, one for each (seed, purpose, *words)."""
    return (random_bits(seed, purpose, *words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


# Every step of an epoch asks for its order, which costs milliseconds.
@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of epoch `epoch` over `n` samples, the same on every machine: int64 [n]."""
    return np.argsort(random_bits(seed, "permutation", epoch, np.arange(n)), kind="stable")


def stratified_subset(labels: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """`n` sorted indices into `labels`, each class in proportion to its share of them.

    Shares are rounded down; the classes with the largest remainders get one sample more.
    """
    # How many of each class.
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (n / len(labels))
    take = np.floor(exact).astype(int)
    by_remainder = np.argsort(take - exact, kind="stable")
    take[by_remainder[: n - take.sum()]] += 1
    # Which ones: the first of each class in a random order of all samples.
    shuffled = np.argsort(random_bits(seed, "subset", np.arange(len(labels))), kind="stable")
    chosen = []
    for label, count in zip(classes, take, strict=True):
        members = shuffled[labels[shuffled] == label]
        chosen.append(members[:count])
    return np.sort(np.concatenate(chosen))


# ---- training


@dataclass(frozen=True)
class Mixing:
    """How the images of one global batch are mixed with their partners.

    `lam` is the share that an image keeps of itself. `centre` is None for Mixup. For CutMix it is
    the centre (y, x) of the pasted square, as fractions of the image's sides; the square covers
    whole pixels within the image, so the share that is really kept differs a little from `lam`.
    """

    lam: float
    centre: tuple[float, float] | None = None


class MicroBatch(NamedTuple):
    """The samples, int64 [micro_batch_size], that one process takes at once."""

    step: int
    epoch: int
    samples: NDArray[np.int64]
    # The side in pixels that they are resized to.
    size: int


@dataclass(frozen=True)
class Order:
    """The order of a run over `samples` images, as seen by process `rank` of `world`.

    Each optimizer step takes a global batch of `batch_size` images. It is cut into accumulation *
    world micro-batches of equal size; micro-batch `micro` of process `rank` is number micro * world
    + rank. The last, incomplete batch of an epoch is dropped, as timm does.
    """

    seed: int
    samples: int
    batch_size: int
    world: int = 1
    rank: int = 0
    accumulation: int = 1

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
        """Places in the global batch of micro-batch `micro`: int64 [micro_batch_size]."""
        start = (micro * self.world + self.rank) * self.micro_batch_size
        return np.arange(start, start + self.micro_batch_size)

    def samples_of(self, step: int) -> NDArray[np.int64]:
        """The samples of optimizer step `step` (from 0): int64 [batch_size]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.batch_size
        return permutation(self.seed, epoch, self.samples)[start : start + self.batch_size]

    def mixing_of_step(self, step: int, mixup: float, cutmix: float, prob: float) -> Mixing:
        """How step `step` is mixed: with probability `prob`, by one share from Beta(alpha, alpha).

        Mixup (Zhang et al. 2018) with alpha `mixup`, or CutMix (Yun et al. 2019) with alpha
        `cutmix`; 0 turns one off, and with both on a step takes either, half and half.
        """
        if not (mixup or cutmix) or uniform(self.seed, "mix", step)[0] >= prob:
            return Mixing(1.0)
        # Mixup or CutMix.
        cuts = cutmix > 0
        if mixup and cutmix:
            cuts = bool(uniform(self.seed, "mix_kind", step)[0] < 0.5)
        # The share that an image keeps of itself; numpy has the Beta distribution.
        alpha = cutmix if cuts else mixup
        bits = int(random_bits(self.seed, "mix_lambda", step)[0])
        lam = np.random.Generator(np.random.PCG64(bits)).beta(alpha, alpha)
        if not cuts:
            return Mixing(lam)
        y, x = (float(uniform(self.seed, purpose, step)[0]) for purpose in ("mix_y", "mix_x"))
        return Mixing(lam, (y, x))


def micro_batches(
    order: Order, start: int, stop: int, size_of: Callable[[int], int]
) -> Iterator[MicroBatch]:
    """The micro-batches of one process over optimizer steps start..stop-1, over epoch borders.

    `size_of` gives the images' side at a step.
    """
    for step in range(start, stop):
        samples = order.samples_of(step)
        epoch = step // order.steps_per_epoch
        for micro in range(order.accumulation):
            yield MicroBatch(step, epoch, samples[order.positions(micro)], size_of(step))


# ---- evaluation


def evaluation_places(n: int, batch_size: int, world: int, rank: int) -> NDArray[np.int64]:
    """Places in the split that process `rank` evaluates, batch by batch: int64 [batches, size].

    Ranks take contiguous parts, in equally many batches of one size. Places from `n` on fill up the
    last batches; no image is there.
    """
    # The fewest batches of at most `batch_size` images, and then the smallest size that will do.
    batches = math.ceil(n / (world * batch_size))
    size = math.ceil(n / (world * batches))
    first = rank * batches * size
    return np.arange(first, first + batches * size).reshape(batches, size)
