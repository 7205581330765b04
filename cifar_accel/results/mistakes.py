"""Where models err: classes that are taken for others, and images that are got wrong.

Functions take the predictions of several runs on the same images, such as one setting's seeds: a
count is then the mean over the runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cifar_accel.records.predictions import Predictions
from cifar_accel.results.calibration import confidence

Floats = NDArray[np.float64]


def confusion(runs: Sequence[Predictions]) -> Floats:
    """How many images of each class (row) are taken for each class (column): float64 [K, K]."""
    classes = len(runs[0].classes)
    pairs = np.concatenate([run.labels * classes + run.predicted for run in runs])
    counts = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    mean: Floats = counts / len(runs)
    return mean


@dataclass(frozen=True)
class Confused:
    """Images of one class that are taken for another one."""

    true: str
    taken_for: str
    # A mean over runs, and the share of the true class's images.
    images: float
    share: float


def most_confused(runs: Sequence[Predictions], count: int) -> list[Confused]:
    """The `count` pairs of classes that are confused most often, most often first."""
    classes = runs[0].classes
    of_class = np.bincount(runs[0].labels, minlength=len(classes))
    # Without the table of all pairs, which may be too large: those that occur, as one number each.
    wrong = [(run.labels * len(classes) + run.predicted)[~run.correct] for run in runs]
    pairs, times = np.unique(np.concatenate(wrong), return_counts=True)
    found = []
    for place in np.argsort(-times, kind="stable")[:count]:
        true, taken_for = divmod(int(pairs[place]), len(classes))
        images = float(times[place]) / len(runs)
        share = images / float(of_class[true])
        found.append(Confused(classes[true], classes[taken_for], images, share))
    return found


def between_superclasses(runs: Sequence[Predictions], superclass: list[str]) -> Floats:
    """Of each super-class's images (row), the share taken for each super-class: float64 [S, S].

    `superclass` is that of each class; rows and columns are in the order of their names. A row
    without images is 0.
    """
    names = sorted(set(superclass))
    # [K, S]: 1 where the class is of the super-class.
    member = np.array([[own == name for name in names] for own in superclass], float)
    table = member.T @ confusion(runs) @ member
    shares: Floats = table / np.maximum(table.sum(1, keepdims=True), 1)
    return shares


def accuracy_by_class(runs: Sequence[Predictions]) -> tuple[Floats, NDArray[np.int64]]:
    """Accuracy of each class, a mean over the runs, and its number of images: [K] each."""
    labels = runs[0].labels
    classes = len(runs[0].classes)
    images = np.bincount(labels, minlength=classes)
    correct = np.mean([run.correct for run in runs], axis=0)
    share: Floats = np.bincount(labels, correct, classes) / np.maximum(images, 1)
    return share, images


@dataclass(frozen=True)
class Mistake:
    """An image that is got wrong."""

    # Its place in the data set's split.
    place: int
    true: str
    taken_for: str
    # The model's probability of what it is taken for; None where it is of several models.
    probability: float | None


def confident_mistakes(run: Predictions, count: int) -> list[Mistake]:
    """The `count` images that the model is surest of and gets wrong; none without logits."""
    if run.logits is None:
        return []
    sure = confidence(run)
    wrong = np.flatnonzero(~run.correct)
    worst = wrong[np.argsort(-sure[wrong], kind="stable")[:count]]
    return [_mistake(run, int(i), float(sure[i])) for i in worst]


def always_taken_for_one(runs: Sequence[Predictions]) -> list[Mistake]:
    """Images that every run takes for one and the same wrong class: the label may be at fault."""
    first = runs[0]
    alike = ~first.correct
    for run in runs[1:]:
        alike &= run.predicted == first.predicted
    return [_mistake(first, int(i)) for i in np.flatnonzero(alike)]


def _mistake(run: Predictions, i: int, probability: float | None = None) -> Mistake:
    true, taken_for = (run.classes[c] for c in (run.labels[i], run.predicted[i]))
    return Mistake(int(run.places[i]), true, taken_for, probability)
