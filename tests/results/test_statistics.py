"""Intervals, tests and verdicts: by hand, beside scipy.stats, and under chance alone."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from scipy import stats

from cifar_accel.results.statistics import (
    MOST_EXACT,
    Interval,
    correlation,
    detectable,
    deviation,
    flips_interval,
    games_howell,
    holm,
    mcnemar,
    mean_interval,
    new_images_interval,
    paired_test,
    seeds_needed,
    sign_flips,
    verdict,
    welch_test,
    wilson,
)


def floats(*values):
    return np.array(values, np.float64)


# Five accuracies of A and B, in points so that the arithmetic can be followed.
A = floats(74.0, 74.4, 74.2, 74.6, 74.3)
B = floats(73.6, 74.2, 73.5, 74.0, 73.8)


def test_the_paired_test_by_hand():
    """Differences -0.4 -0.2 -0.7 -0.6 -0.5: the sum is -2.4, the mean -0.48.

    Their distances from it are 0.08 0.28 -0.22 -0.12 -0.02; the squares sum to 0.148, so the SD is
    sqrt(0.148 / 4) = 0.19235 and the standard error 0.19235 / sqrt(5) = 0.08602. With 4 degrees of
    freedom t cuts at 2.77645: 0.23884 to either side.
    """
    test = paired_test(B - A)
    assert test.difference == pytest.approx(-0.48)
    assert test.standard_error == pytest.approx(0.0860233)
    assert test.interval == pytest.approx((-0.718838, -0.241162), abs=1e-5)
    theirs = stats.ttest_rel(B, A)
    assert test.p == pytest.approx(theirs.pvalue)
    assert test.interval == pytest.approx(tuple(theirs.confidence_interval()))


def test_welch_by_hand():
    """A 1 2 3: mean 2, variance 1; B 4 6 8 10: mean 7, variance 20/3.

    Squared standard errors 1/3 and 5/3, in sum 2. Degrees of freedom: 4 over (1/9) / 2 + (25/9) / 3
    = 53/54, so 216/53. t = 5 / sqrt(2).
    """
    a, b = floats(1, 2, 3), floats(4, 6, 8, 10)
    test = welch_test(a, b)
    assert test.difference == 5
    assert test.standard_error == pytest.approx(2**0.5)
    assert test.degrees_of_freedom == pytest.approx(216 / 53)
    theirs = stats.ttest_ind(b, a, equal_var=False)
    assert theirs.statistic == pytest.approx(5 / 2**0.5)
    assert test.p == pytest.approx(theirs.pvalue)
    assert test.interval == pytest.approx(tuple(theirs.confidence_interval()))


def test_the_interval_of_a_mean():
    theirs = stats.t.interval(0.95, 4, A.mean(), stats.sem(A))
    assert mean_interval(A) == pytest.approx(theirs)
    assert mean_interval(floats(0.5)) is None


def test_sign_flips_by_hand():
    """1 2 3 sum to 6: of the eight sums only 6 and -6 are as far, so 2/8.

    -1 2 3 sum to 4: as far are 6 and -6 (equal signs), and 4 and -4: 4/8.
    """
    assert sign_flips(floats(1, 2, 3)) == 2 / 8
    assert sign_flips(floats(-1, 2, 3)) == 4 / 8
    assert sign_flips(floats(0, 0, 0)) == 1
    # All of one sign is the least that there is.
    assert sign_flips(floats(*range(1, 7))) == 2 / 64


@pytest.mark.parametrize("n", [3, 8, 13])
def test_all_sign_flips_are_counted(n):
    values = np.random.default_rng(n).normal(0.5, 1, n)
    sums = [abs(np.dot(signs, values)) for signs in product((-1, 1), repeat=n)]
    as_far = np.array(sums) >= abs(values.sum()) - 1e-9
    assert sign_flips(values) == as_far.mean()


def test_many_sign_flips_are_drawn():
    """As often as not, the same p; and none is 0."""
    values = np.random.default_rng(0).normal(0.3, 1, MOST_EXACT + 5)
    assert sign_flips(values) == sign_flips(values)
    assert sign_flips(values) == pytest.approx(paired_test(values).p, abs=0.03)
    assert 0 < sign_flips(np.ones(40)) < 0.001


def test_equal_sums_are_as_far_in_spite_of_rounding():
    """0.1 + 0.2 - 0.3 is not 0 in floating point, and all eight sums of 0 0 0 are equal."""
    assert sign_flips(floats(0.1, 0.2, -0.3)) == 1


def test_wilson_by_hand():
    """8 of 10, z = 1.96: the middle is (0.8 + 0.19207) / 1.38415 = 0.71675, the half-width
    1.96 * sqrt(0.016 + 0.0096036) / 1.38415 = 0.22657."""
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    for right, images in ((0, 10), (10, 10), (7431, 10_000)):
        theirs = stats.binomtest(right, images).proportion_ci(method="wilson")
        assert wilson(right, images) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_mcnemar_by_hand():
    """1 against 5: twice (1 + 6) / 2^6 is 0.21875. 3 against 3 is more than 1, so 1."""
    assert mcnemar(1, 5) == mcnemar(5, 1) == pytest.approx(0.21875)
    assert mcnemar(3, 3) == 1
    assert mcnemar(0, 0) == 1
    assert mcnemar(912, 841) == pytest.approx(stats.binomtest(912, 912 + 841).pvalue)


def test_the_interval_of_flips_by_hand():
    """912 and 841 of 10,000: -0.0071, and 1.96 * sqrt(1753 - 71^2 / 10,000) / 10,000 = 0.0082."""
    assert flips_interval(912, 841, 10_000) == pytest.approx((-0.015304, 0.001104), abs=1e-6)
    assert flips_interval(0, 0, 100) is None
    assert flips_interval(0, 100, 100) is None


def test_new_images_by_hand():
    """Half-widths 3 over seeds and 4 over images make 5.

    100 images, half of them +x and half -x, have the SD x * sqrt(100 / 99).
    """
    x = 4 * 10 / 1.959964 * (99 / 100) ** 0.5
    by_image = np.repeat(floats(x, -x), 50)
    test = paired_test(floats(1, 2, 3))
    test = test._replace(interval=Interval(test.difference - 3, test.difference + 3))
    assert new_images_interval(by_image, test) == pytest.approx((-3, 7), abs=1e-5)
    assert new_images_interval(by_image, paired_test(floats(1, 1))) is None


@pytest.mark.parametrize(
    "n, paired, unpaired",
    [(3, 3.26, 3.07), (5, 1.68, 2.02), (6, 1.43, 1.80), (10, 1.00, 1.32), (20, 0.66, 0.91)],
)
def test_what_can_be_seen(n, paired, unpaired):
    """In units of the standard deviation of the differences, and of the runs of a setting."""
    of_pairs = detectable(n**-0.5, n - 1)
    assert of_pairs == pytest.approx(paired, abs=0.006)
    assert detectable((2 / n) ** 0.5, 2 * n - 2) == pytest.approx(unpaired, abs=0.006)
    # Four times in five: by the noncentral t beyond its 97.5 % point.
    chance = stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, of_pairs * n**0.5)
    assert chance == pytest.approx(0.8, abs=1e-4)
    # So many seeds see just that, and fewer do not.
    assert seeds_needed(of_pairs + 1e-9, 1.0, paired=True) == n
    assert seeds_needed(of_pairs - 1e-3, 1.0, paired=True) == n + 1
    assert seeds_needed(unpaired + 0.006, 2.0, paired=False) == n


def test_what_no_study_sees():
    assert seeds_needed(0.0, 1.0, paired=True) is None


def test_holm_by_hand():
    """0.01 * 3 = 0.03; 0.03 * 2 = 0.06; 0.04 * 1 is below the one before it. In any order."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_where_more_was_looked_at():
    """0.01 * 6, 0.03 * 5 and 0.04 * 4: the others may all be larger."""
    assert holm([0.04, 0.01, 0.03], tests=6) == pytest.approx([0.16, 0.06, 0.15])


def test_games_and_howell_against_scipy():
    groups = [floats(0.70, 0.72, 0.71), floats(0.69, 0.70, 0.72, 0.68), floats(0.60, 0.61)]
    expected = stats.tukey_hsd(*groups, equal_var=False).pvalue[0, 1:]
    p = [games_howell(welch_test(groups[0], other), 3) for other in groups[1:]]
    assert p == pytest.approx(expected.tolist())
    assert games_howell(welch_test(floats(1, 1), floats(2, 2)), 3) == 1


def test_values_without_a_spread():
    """Nothing is NaN: t knows nothing of such values, and says so."""
    # In floating point these three differences are not quite equal.
    equal = floats(0.8, 0.7, 0.6) - floats(0.7, 0.6, 0.5)
    assert len(set(equal)) > 1 and deviation(equal) == 0
    assert paired_test(equal)[1:4] == (None, None, 0)
    assert welch_test(floats(1, 1), floats(2, 2))[:4] == (1, None, None, 0)
    assert correlation(floats(1, 1, 1), floats(1, 2, 3)) is None
    assert correlation(floats(1, 2, 3), floats(2, 4, 6)) == pytest.approx(1)
    # One of two without a spread is enough for Welch: half of it is n = 3 alone.
    assert welch_test(floats(1, 1, 1), floats(1, 2, 3)).degrees_of_freedom == pytest.approx(2)


BEYOND, WITHIN = Interval(0.001, 0.011), Interval(-0.004, 0.004)


@pytest.mark.parametrize(
    "interval, p, flips, runs, word",
    [
        (BEYOND, 0.01, 0.03, 6, "better"),
        # Five pairs cannot do it, and are no six runs either.
        (BEYOND, 0.01, 0.0625, 6, "tentatively"),
        (BEYOND, 0.01, 0.03, 5, "tentatively"),
        (BEYOND, 0.01, 0.25, 3, "tentatively"),
        # Not paired.
        (BEYOND, 0.01, None, 10, "tentatively"),
        # By Holm.
        (BEYOND, 0.06, 0.03, 10, "cannot tell"),
        (BEYOND, 0.0001, 0.5, 2, "cannot tell"),
        (WITHIN, 0.9, 0.9, 3, "same"),
        (WITHIN, 0.9, 0.9, 2, "cannot tell"),
        (Interval(-0.006, 0.004), 0.6, 0.6, 10, "cannot tell"),
        # Surely ahead, and by less than matters.
        (Interval(0.001, 0.004), 0.001, 0.03, 6, "same"),
        (None, None, 0.03, 6, "cannot tell"),
    ],
)
def test_verdicts(interval, p, flips, runs, word):
    difference = sum(interval) / 2 if interval else 0.01
    assert verdict(difference, interval, p, flips, runs, margin=0.005) == word


def test_equal_runs_are_the_same():
    assert verdict(0.0, None, None, 1.0, 3, margin=0.005) == "same"
    assert verdict(0.0, None, None, 1.0, 2, margin=0.005) == "cannot tell"


@pytest.mark.parametrize("n", [3, 6, 10])
@pytest.mark.parametrize("paired", [True, False])
def test_chance_alone_is_seldom_taken_for_a_difference(n, paired):
    """2,000 studies of two equal settings: at most 6.5 % are told as a difference.

    5 % are meant; 6.5 % is three standard errors of 2,000 studies above it.
    """
    rng = np.random.default_rng(n)
    words = Counter()
    for _ in range(2_000):
        a, b = rng.normal(0.74, 0.003, (2, n))
        test = paired_test(b - a) if paired else welch_test(a, b)
        flips = sign_flips(b - a) if paired else None
        words[verdict(test.difference, test.interval, test.p, flips, n, margin=0.0)] += 1
    assert words["better"] + words["tentatively"] <= 0.065 * 2_000
    # The bound is not met by never telling: some of them are.
    assert words["better"] + words["tentatively"] >= 0.03 * 2_000
    assert words["better"] == 0 or (n >= 6 and paired)


def test_what_is_said_of_new_images_holds_for_them():
    """The interval has the true difference, 0, in at least 95 % of 1,000 studies.

    Both the images and the seeds are drawn anew for each; all images are hard for some models.
    """
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1_000):
        ease = rng.normal(0, 1, 500)
        right = ease + rng.normal(0, 0.5, (2, 4, 500)) + rng.normal(0, 0.05, (2, 4, 1)) > 0
        test = paired_test(right[1].mean(1) - right[0].mean(1))
        interval = new_images_interval(right[1].mean(0) - right[0].mean(0), test)
        held += interval.low <= 0 <= interval.high
    assert held >= 950


def test_a_real_difference_is_found():
    """Twice the standard deviation, with ten pairs: nearly always."""
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        differences = rng.normal(0.006, 0.003, 10)
        test = paired_test(differences)
        flips = sign_flips(differences)
        found += verdict(test.difference, test.interval, test.p, flips, 10, 0.0) == "better"
    assert found >= 190
