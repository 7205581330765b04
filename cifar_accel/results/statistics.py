"""What accuracies say of a difference between two settings: intervals, tests and a verdict.

Accuracies and differences are shares of 1, in float64 arrays with one value for each run. A and B
are the two settings, and a difference is B - A. Every interval is of 95 %. Nothing in here knows of
run folders. The distributions are those of `scipy.special`: `scipy.stats`, which has the tests by
name, takes a second to load.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

Values = NDArray[np.float64]
Verdict = Literal["better", "tentatively", "cannot tell", "same"]

# Above this p a difference may be chance.
ALPHA = 0.05
# Where a distribution is cut at both sides, so that 95 % lie between.
UPPER = 1 - ALPHA / 2
# The chance to see a difference that is there, for which studies are planned.
POWER = 0.8

# Two runs of a setting never say which is better, and with fewer than 6 pairs the sign flips
# cannot go below 5 %.
LEAST_RUNS = 3
LEAST_RUNS_FOR_BETTER = 6

# Up to this many pairs all sign flips are counted, 2^19 of them; beyond, so many are drawn.
MOST_EXACT = 20
FLIPS_DRAWN = 10_000

# Studies of more seeds than this are not thought of.
MOST_SEEDS = 1_000

# Shares that differ by less are equal: no test set has so many images.
ROUNDING = 1e-10


class Interval(NamedTuple):
    """An interval of 95 %."""

    low: float
    high: float


class TTest(NamedTuple):
    """A t test of a difference of means."""

    difference: float
    # None for both where the values have no spread, of which t knows nothing.
    interval: Interval | None
    # Two-sided.
    p: float | None
    # Of the difference.
    standard_error: float
    degrees_of_freedom: float


# ---- over seeds


def deviation(values: Values) -> float:
    """Standard deviation of the sample, with n - 1, of float64 [n]; 0 for equal values, or one."""
    if np.ptp(values) < ROUNDING:
        return 0.0
    return float(np.std(values, ddof=1))


def mean_interval(values: Values) -> Interval | None:
    """Student's t interval of the mean of float64 [n]; None for equal values, or a single one."""
    return paired_test(values).interval


def paired_test(differences: Values) -> TTest:
    """The paired t test (Student 1908) of differences by seed, float64 [n].

    One alone has no interval.
    """
    n = len(differences)
    return _t_test(float(np.mean(differences)), deviation(differences) / n**0.5, n - 1)


def welch_test(a: Values, b: Values) -> TTest:
    """Welch's t test (1947) of two sets of runs, float64 [n] and [m], both of at least 2.

    Colas et al. (2018, arXiv 1806.08295) recommend it for few seeds. The degrees of freedom are
    Satterthwaite's (1946).
    """
    variance_a = deviation(a) ** 2 / len(a)
    variance_b = deviation(b) ** 2 / len(b)
    variance = variance_a + variance_b
    freedom = len(a) + len(b) - 2.0
    if variance:
        parts = variance_a**2 / (len(a) - 1) + variance_b**2 / (len(b) - 1)
        freedom = variance**2 / parts
    return _t_test(float(np.mean(b) - np.mean(a)), variance**0.5, freedom)


def _t_test(difference: float, standard_error: float, freedom: float) -> TTest:
    if standard_error == 0:
        return TTest(difference, None, None, 0.0, freedom)
    half = float(special.stdtrit(freedom, UPPER)) * standard_error
    p = 2 * float(special.stdtr(freedom, -abs(difference) / standard_error))
    interval = Interval(difference - half, difference + half)
    return TTest(difference, interval, p, standard_error, freedom)


def sign_flips(differences: Values) -> float:
    """Two-sided p of Fisher's randomization test (1935) of differences by seed, float64 [n].

    If A and B were the same, each difference might as well have the other sign. Of all 2^n
    choices of signs, p is the share whose mean is as far from 0 as the mean that was seen. So it
    cannot go below 2 / 2^n. Of more than 20 differences, 10,000 choices are drawn, always the same
    ones, and the choice that was seen counts as one more (Phipson and Smyth 2010).
    """
    n = len(differences)
    seen = abs(np.sum(differences)) - n * ROUNDING
    if n <= MOST_EXACT:
        # A choice and its opposite are equally far from 0, so the first sign stays.
        sums = differences[:1]
        for difference in differences[1:]:
            sums = np.concatenate([sums + difference, sums - difference])
        return float(np.mean(np.abs(sums) >= seen))
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (FLIPS_DRAWN, n))
    as_far = np.abs(signs @ differences) >= seen
    return float((1 + np.sum(as_far)) / (1 + FLIPS_DRAWN))


def correlation(a: Values, b: Values) -> float | None:
    """Pearson's r of accuracies by seed, float64 [n] each; None where one of them has no spread."""
    if deviation(a) == 0 or deviation(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


# ---- over images


def wilson(right: int, images: int) -> Interval:
    """Wilson's score interval (1927) of the share of `images` that are `right`."""
    z = float(special.ndtri(UPPER))
    share = right / images
    scale = 1 + z**2 / images
    middle = (share + z**2 / (2 * images)) / scale
    half = z * (share * (1 - share) / images + z**2 / (4 * images**2)) ** 0.5 / scale
    # Rounding must not lead out of what a share can be.
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def mcnemar(a_alone: int, b_alone: int) -> float:
    """Two-sided p of McNemar's exact test (1947) of two models on the same images.

    `a_alone` images A gets right and B wrong, `b_alone` the other way round. If the models were
    equally good, each such image would fall to either with one half.
    """
    fewer = min(a_alone, b_alone)
    return min(1.0, 2 * float(special.bdtr(fewer, a_alone + b_alone, 0.5)))


def flips_interval(a_alone: int, b_alone: int, images: int) -> Interval | None:
    """Wald's interval of the difference of two models' accuracies on the same `images`.

    As in Agresti, Categorical Data Analysis, on matched pairs. None where no image, or each, is
    right in the same one of both.
    """
    surplus = b_alone - a_alone
    variance = a_alone + b_alone - surplus**2 / images
    if variance <= 0:
        return None
    half = float(special.ndtri(UPPER)) * variance**0.5 / images
    return Interval(surplus / images - half, surplus / images + half)


def new_images_interval(by_image: Values, test: TTest) -> Interval | None:
    """The interval of a difference for other images of the same kind, and other seeds.

    Args:
        by_image: float64 [N], for each image the share of B's runs that get it right, less the
            share of A's.
        test: of the same runs, over seeds.

    The half-widths over seeds (t) and over images (normal) are added as squares (Zou and Donner
    2008), so that it is never narrower than the interval over seeds. It is somewhat too wide: what
    seeds do to single images counts in both. None where the runs have no spread.
    """
    if test.interval is None:
        return None
    over_seeds = test.interval.high - test.difference
    over_images = float(special.ndtri(UPPER)) * deviation(by_image) / len(by_image) ** 0.5
    half = float(np.hypot(over_seeds, over_images))
    return Interval(test.difference - half, test.difference + half)


# ---- what a study can see


def detectable(standard_error: float, freedom: float) -> float:
    """The difference that a t test finds four times in five, by the noncentral t (Cohen 1988).

    It takes the standard error that was seen for the true one.
    """
    critical = special.stdtrit(freedom, UPPER)
    return standard_error * float(special.nctdtrinc(freedom, 1 - POWER, critical))


def seeds_needed(difference: float, variance: float, paired: bool) -> int | None:
    """How many seeds each a t test needs to find `difference` four times in five.

    `variance` is that of the differences by seed, or the sum of A's and B's where the runs are not
    `paired`. None for more than 1,000.
    """
    for n in range(2, MOST_SEEDS + 1):
        freedom = n - 1 if paired else 2 * (n - 1)
        if detectable((variance / n) ** 0.5, freedom) <= difference:
            return n
    return None


# ---- conclusions


def holm(p: list[float], tests: int | None = None) -> list[float]:
    """Holm's p values (1979): compared with 5 %, one false find in all happens in at most 5 %.

    `tests` is how many there were, where others than these were looked at too (unset: these). Their
    p are taken to be larger, which is never too lenient.
    """
    values = np.array(p)
    order = np.argsort(values)
    # The smallest counts for all, the next for one less, and none is below the one before it.
    steps = values[order] * ((tests or len(values)) - np.arange(len(values)))
    adjusted: Any = np.empty(len(values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted.tolist()


def games_howell(test: TTest, settings: int) -> float:
    """p of one pair of so many settings that were looked at, from Welch's `test` of the two.

    Games and Howell (1976): Tukey's range test for settings whose spreads may differ. What may come
    of choosing the best is in it. 1 where there is no spread.
    """
    # It takes a second to load.
    from scipy.stats import studentized_range

    if test.standard_error == 0:
        return 1.0
    distance = abs(test.difference) / test.standard_error * 2**0.5
    return float(studentized_range.sf(distance, settings, test.degrees_of_freedom))


def verdict(
    difference: float,
    interval: Interval | None,
    p: float | None,
    flips: float | None,
    runs: int,
    margin: float,
) -> Verdict:
    """What may be said of two settings on the images that they were tested on.

    Args:
        difference: of the means; `interval` is its own, None where the runs have no spread.
        p: of the t test; as one of several, where there are more.
        flips: p of the sign flips; None for runs that are not paired.
        runs: of the setting that has fewer, at least 2.
        margin: settings that differ by less are the same.

    "same" is the two one-sided tests (Schuirmann 1987), at 2.5 % each, or equal accuracies in every
    pair. "better" and "tentatively" are of the one that is ahead.
    """
    if runs < LEAST_RUNS:
        return "cannot tell"
    if interval is None or p is None:
        return "same" if abs(difference) < ROUNDING else "cannot tell"
    if -margin < interval.low and interval.high < margin:
        return "same"
    if p >= ALPHA:
        return "cannot tell"
    if runs >= LEAST_RUNS_FOR_BETTER and flips is not None and flips < ALPHA:
        return "better"
    return "tentatively"
