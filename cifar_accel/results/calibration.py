"""How far a model's probabilities can be believed (Guo et al. 2017)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from cifar_accel.records.predictions import Predictions

BINS = 15
# Temperatures that are looked through.
COLDEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True)
class Bin:
    """Images whose largest probability lies in one of the equally wide bins."""

    images: int
    # Mean of that probability, and the share of correct answers.
    confidence: float
    accuracy: float


def reliability(probability: NDArray[np.float64], correct: NDArray[np.bool_]) -> list[Bin]:
    """The bins that hold any image, by confidence.

    `probability` float64 [N] is that of the predicted class, `correct` bool [N] whether it is true.
    """
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    found = []
    for number in range(BINS):
        inside = bins == number
        if inside.any():
            means = float(probability[inside].mean()), float(correct[inside].mean())
            found.append(Bin(int(inside.sum()), *means))
    return found


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: the mean gap of confidence and accuracy, over images."""
    images = sum(of_bin.images for of_bin in bins)
    gaps = (of_bin.images * abs(of_bin.confidence - of_bin.accuracy) for of_bin in bins)
    return sum(gaps) / images


def temperature(held_out: Predictions) -> float:
    """What logits are divided by so that held-out images are likeliest; above 1: overconfident.

    Of images that the model was not chosen by. They must have logits.
    """
    assert held_out.logits is not None
    logits = held_out.logits.astype(np.float64)
    rows = np.arange(len(logits))

    def loss(log_temperature: float) -> float:
        shares = log_softmax(logits / np.exp(log_temperature), axis=1)
        return -float(shares[rows, held_out.labels].mean())

    best = minimize_scalar(loss, bounds=np.log([COLDEST, HOTTEST]), method="bounded")
    return float(np.exp(best.x))


def confidence(run: Predictions, divisor: float = 1.0) -> NDArray[np.float64]:
    """float64 [N]: the probability of the predicted class, the logits divided by `divisor`.

    The run must have logits.
    """
    assert run.logits is not None
    cooled = run.logits.astype(np.float64) / divisor
    rows = np.arange(len(cooled))
    shares: NDArray[np.float64] = np.exp(log_softmax(cooled, axis=1))[rows, run.predicted]
    return shares
