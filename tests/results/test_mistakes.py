"""Confused classes, wrong images and calibration, by hand."""

import numpy as np
import pytest

from cifar_accel.records.predictions import Predictions
from cifar_accel.results.calibration import (
    calibration_error,
    confidence,
    reliability,
    temperature,
)
from cifar_accel.results.mistakes import (
    accuracy_by_class,
    always_taken_for_one,
    between_superclasses,
    confident_mistakes,
    confusion,
    most_confused,
)
from cifar_accel.results.superclasses import CIFAR100, superclass_of

CLASSES = ["ant", "bee", "cat"]


def said(labels, predicted, sure=0.8, classes=CLASSES):
    """Predictions that give `predicted` with probability `sure` (one number, or [N])."""
    labels, predicted = np.array(labels), np.array(predicted)
    sure = np.broadcast_to(sure, labels.shape)
    rest = (1 - sure) / (len(classes) - 1)
    shares = np.repeat(rest[:, None], len(classes), 1)
    shares[np.arange(len(labels)), predicted] = sure
    logits = np.log(shares)
    first_five = np.argsort(-logits, axis=1, kind="stable")
    places = 10 * np.arange(len(labels))
    return Predictions(labels, first_five, logits.astype(np.float16), classes, places, "abc")


def in_short(mistakes):
    return [(m.place, m.true, m.taken_for) for m in mistakes]


ONE = said([0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 2, 2])
TWO = said([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 0])


def test_classes_that_are_confused():
    """Means over two runs: of three ants one and a half are taken for bees."""
    assert confusion([ONE, TWO]).tolist() == [[1.5, 1.5, 0], [0, 1, 1], [0.5, 0, 0.5]]
    pairs = most_confused([ONE, TWO], 2)
    assert [(pair.true, pair.taken_for, pair.images, pair.share) for pair in pairs] == [
        ("ant", "bee", 1.5, 0.5),
        ("bee", "cat", 1.0, 0.5),
    ]
    # No pair is named that is not confused.
    assert len(most_confused([ONE], 9)) == 2


def test_accuracy_by_class():
    share, images = accuracy_by_class([ONE, TWO])
    assert share.tolist() == [0.5, 0.5, 0.5]
    assert images.tolist() == [3, 2, 1]


def test_superclasses():
    shares = between_superclasses([ONE], ["insect", "insect", "animal"])
    # In the order of names: the cat is taken for a cat; of five insects one for a cat.
    assert shares.tolist() == [[1.0, 0.0], [0.2, 0.8]]


def test_a_superclass_without_images_has_no_share():
    run = said([0, 1], [0, 2])
    shares = between_superclasses([run], ["insect", "insect", "animal"])
    assert shares.tolist() == [[0.0, 0.0], [0.5, 0.5]]


def test_the_superclasses_of_cifar100():
    names = sorted(name for of_one in CIFAR100.values() for name in of_one.split())
    assert len(set(names)) == 100
    above = superclass_of(names)
    assert above[names.index("otter")] == "aquatic mammals"
    assert len(set(above)) == 20
    # In the hub's spelling, and not for other classes.
    assert superclass_of(["cra" if name == "crab" else name for name in names]) == above
    assert superclass_of(names[:-1]) is None


def test_mistakes_that_the_model_is_sure_of():
    run = said([0, 1, 2, 0], [1, 1, 0, 2], sure=[0.6, 0.99, 0.9, 0.7])
    found = confident_mistakes(run, 2)
    assert [(m.place, m.true, m.taken_for) for m in found] == [
        (20, "cat", "ant"),
        (30, "ant", "cat"),
    ]
    assert found[0].probability == pytest.approx(0.9, abs=1e-3)


def test_images_that_all_runs_take_for_one_wrong_class():
    found = always_taken_for_one([ONE, TWO])
    assert [(m.place, m.true, m.taken_for) for m in found] == [
        (20, "ant", "bee"),
        (40, "bee", "cat"),
    ]


def test_calibration_error():
    """Half of those at 0.9 are right, and all of those at 0.5: (2 * 0.4 + 2 * 0.5) / 4."""
    probability = np.array([0.9, 0.9, 0.5, 0.5])
    bins = reliability(probability, np.array([True, False, True, True]))
    assert [(of_bin.images, of_bin.accuracy) for of_bin in bins] == [(2, 1.0), (2, 0.5)]
    assert calibration_error(bins) == pytest.approx(0.45)
    # A probability of 1 lies in the last bin.
    assert reliability(np.array([1.0]), np.array([True]))[0].images == 1


def test_the_temperature_mends_confidence():
    """Ten models' worth of images that are right in 70 % and said to be right in 95 %."""
    labels = np.zeros(1000, int)
    predicted = np.where(np.arange(1000) % 10 < 7, 0, 1 + np.arange(1000) % 2)
    run = said(labels, predicted, sure=0.95)
    divisor = temperature(run)
    # (0.7 / 0.15) = (0.95 / 0.025) ** (1 / T)
    assert divisor == pytest.approx(np.log(38) / np.log(0.7 / 0.15), rel=1e-2)
    cooled = confidence(run, divisor)
    assert cooled.mean() == pytest.approx(0.7, abs=1e-2)
    before = calibration_error(reliability(confidence(run), run.correct))
    after = calibration_error(reliability(cooled, run.correct))
    assert before == pytest.approx(0.25, abs=1e-2) and after < 0.01
