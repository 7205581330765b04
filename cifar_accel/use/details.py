"""What predictions say beyond their accuracy: calibration, classes, confusions, mistakes."""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifar_accel.records.predictions import Predictions
from cifar_accel.records.trackers import Findings, ShownMistake
from cifar_accel.results.calibration import calibration_error, confidence, reliability
from cifar_accel.results.mistakes import (
    accuracy_by_class,
    between_superclasses,
    confident_mistakes,
    most_confused,
)
from cifar_accel.results.statistics import wilson
from cifar_accel.results.superclasses import superclass_of

# Pairs of classes that are listed, and mistakes that a tracker is shown, with their longest side.
PAIRS = 10
MISTAKES = 64
MISTAKE_SIDE = 96


def details(predictions: Predictions) -> dict[str, Any]:
    """What `predictions` say beyond their accuracy, as JSON has it.

    Returns:
        accuracy_interval: Wilson's, 95 %, over images. calibration_error: the expected one, in 15
        bins; None without logits. classes: name, accuracy and images of each class that has any.
        superclasses: likewise for CIFAR-100. confused: the pairs that are confused most often.
    """
    right, count = int(predictions.correct.sum()), len(predictions.labels)
    error = None
    if predictions.logits is not None:
        error = calibration_error(reliability(confidence(predictions), predictions.correct))
    accuracy, images = accuracy_by_class([predictions])
    found: dict[str, Any] = {
        "accuracy_interval": list(wilson(right, count)),
        "calibration_error": error,
        "classes": _shares(predictions.classes, accuracy, images),
        "confused": [asdict(pair) for pair in most_confused([predictions], PAIRS)],
    }
    above = superclass_of(predictions.classes)
    if above:
        names = sorted(set(above))
        of_superclass = [sum(images[np.array(above) == name]) for name in names]
        shares = between_superclasses([predictions], above).diagonal()
        found["superclasses"] = _shares(names, shares, np.array(of_superclass))
    return found


def _shares(
    names: list[str], accuracy: NDArray[np.float64], images: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Name, accuracy and number of images, of those that have any."""
    rows = zip(names, accuracy, images, strict=True)
    return [{"name": n, "accuracy": float(a), "images": int(i)} for n, a, i in rows if i]


def findings(predictions: Predictions, images: NDArray[np.uint8]) -> Findings:
    """What a tracker shows of `predictions`; `images` uint8 [N, 3, H, W] are what they are of."""
    found = details(predictions)
    low, high = found["accuracy_interval"]
    figures = {"test/accuracy_low": low, "test/accuracy_high": high}
    if found["calibration_error"] is not None:
        figures["test/calibration_error"] = found["calibration_error"]
    # A mistake knows its place in the data set, the images are of those that were judged.
    row_of = {place: row for row, place in enumerate(predictions.places.tolist())}
    mistakes = [
        ShownMistake(
            _thumbnail(images[row_of[m.place]]), m.place, m.true, m.taken_for, m.probability
        )
        for m in confident_mistakes(predictions, MISTAKES)
    ]
    return Findings(
        labels=predictions.labels,
        predicted=predictions.predicted,
        classes=predictions.classes,
        by_class=[(c["name"], c["accuracy"], c["images"]) for c in found["classes"]],
        confused=[(c["true"], c["taken_for"], round(c["images"])) for c in found["confused"]],
        mistakes=mistakes,
        figures=figures,
    )


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [3, H, W] -> [h, w, 3], of `MISTAKE_SIDE` pixels at most."""
    shown = Image.fromarray(image.transpose(1, 2, 0))
    shown.thumbnail((MISTAKE_SIDE, MISTAKE_SIDE))
    return np.asarray(shown)
