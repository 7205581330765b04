"""Which sizes and epochs fit into a time."""

import pytest

from cifar_accel.budget import (
    BATCH_NORM_GROWTH,
    RESERVE,
    Speed,
    TooShort,
    fit_choices,
    growing_to,
    lengthened,
    points_lost,
    text_of,
)
from cifar_accel.options.values import parse_sizes

# As tf_efficientnet_lite0 on two cores: batch 128, seconds a step and of an evaluation.
SPEED = Speed({64: 0.31, 96: 0.62, 128: 1.14}, {64: 8.0, 96: 15.0, 128: 25.0})
STEPS = 390
CHOICES = [growing_to(last) for last in (64, 96, 128, 160, 192, 224)]


def test_measured_sides_are_taken_as_they_are_and_others_lie_on_a_line():
    assert SPEED.step(96) == 0.62
    assert SPEED.step(112) == pytest.approx(0.62 + (1.14 - 0.62) * (112**2 - 96**2) / 7168)
    assert SPEED.step(256) > SPEED.step(128)
    assert 0 < SPEED.step(32) < SPEED.step(64)
    # Between 128 and 224, though 96 is as near as 224.
    four = Speed({**SPEED.steps, 224: 5.0}, {})
    assert four.step(160) == pytest.approx(1.14 + (5 - 1.14) * (160**2 - 128**2) / 33792)


def test_noise_and_a_single_side():
    assert Speed({64: 0.3, 96: 0.2}, {}).step(128) == 0.3
    assert Speed({64: 0.3}, {}).step(128) == pytest.approx(1.2)


def test_few_images_are_seen_often():
    """3,000 steps at least, where an epoch has few."""
    (best,) = fit_choices(10**6, SPEED, 3, [growing_to(128)])
    assert best.epochs == 1000


def test_an_epoch_is_the_mean_of_a_run():
    parts = parse_sizes("64:0.4,96:0.7,128")
    step = 0.4 * 0.31 + 0.3 * 0.62 + 0.3 * 1.14
    assert SPEED.epoch(parts, STEPS) == pytest.approx(STEPS * step + 25)


def test_sides_grow_in_steps_of_16():
    assert growing_to(128) == parse_sizes("64:0.4,96:0.7,128")
    for last in (64, 96, 160, 192, 224):
        assert all(side % 16 == 0 for side, _ in growing_to(last))
    assert growing_to(128, BATCH_NORM_GROWTH) == parse_sizes("96:0.6,128")
    # At the least size, parts of one side are one part.
    assert growing_to(32) == ((32, 1.0),)


@pytest.mark.parametrize("minutes", [10, 15, 30, 60, 120, 600])
def test_what_fits_is_filled(minutes):
    seconds = 60 * minutes
    best, *others = fit_choices(seconds, SPEED, STEPS, CHOICES)
    assert all(best.lost <= other.lost for other in others)
    longer = lengthened(best, seconds, SPEED, STEPS)
    assert longer.epochs == best.epochs
    # As --image-size says it, it takes as long.
    parts = parse_sizes(text_of(longer.parts))
    takes = longer.epochs * SPEED.epoch(parts, STEPS)
    assert takes == pytest.approx(longer.seconds, rel=0.01)
    assert takes <= seconds
    if best.epochs < 25:
        assert takes >= seconds * (1 - RESERVE) * 0.9


def test_what_is_left_goes_on_to_the_second_part():
    """Of one epoch the first part alone may be too little."""
    (only,) = fit_choices(270, SPEED, STEPS, [growing_to(96)])
    longer = lengthened(only, 270, SPEED, STEPS)
    (side, share), last = longer.parts
    assert (side, last) == (64, (96, 1.0)) and 0 < share < 0.3
    assert longer.seconds == pytest.approx(243)


def test_more_time_takes_larger_images():
    sides = [
        fit_choices(60 * minutes, SPEED, STEPS, CHOICES)[0].parts[-1][0]
        for minutes in (15, 60, 240)
    ]
    assert sides == sorted(sides)
    assert sides[0] < sides[-1]


def test_what_is_chosen_already():
    (only,) = fit_choices(3600, SPEED, STEPS, [((96, 1.0),)])
    assert text_of(only.parts) == 96
    assert lengthened(only, 3600, SPEED, STEPS) == only
    assert {choice.epochs for choice in fit_choices(3600, SPEED, STEPS, CHOICES, epochs=4)} == {4}


def test_too_short_a_time_names_the_shortest():
    with pytest.raises(TooShort) as failure:
        fit_choices(30, SPEED, STEPS, CHOICES)
    assert fit_choices(failure.value.seconds + 1e-6, SPEED, STEPS, CHOICES)
    with pytest.raises(TooShort):
        fit_choices(failure.value.seconds - 1, SPEED, STEPS, CHOICES)


def test_points_are_lost_to_small_images_and_few_epochs():
    assert points_lost(64, 10) > points_lost(96, 10) > points_lost(128, 10)
    assert points_lost(96, 3) > points_lost(96, 10)
