"""Metrics of logits and labels: accuracy with its interval, classes, calibration. All in float64, on the CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar.checks import given

BINS = 15
"""Number of bins of the calibration error, as in Guo et al. 2017."""
NORMAL_95 = 1.959963984540054
"""The normal distribution's 97.5% quantile."""
MOST_CONFUSED = 1000
"""Most classes of a confusion matrix, which has an entry for each pair of them."""
TEMPERATURES = (0.01, 100.0)
"""Bounds of the search for the temperature."""


@dataclass(frozen=True)
class ClassScore:
    """Recall and precision of one class, as fractions; None where nothing was counted."""

    name: str
    images: int
    recall: float | None
    """Share of the class's images that were predicted as it."""
    precision: float | None
    """Share of the images predicted as the class that belong to it."""


@dataclass(frozen=True)
class Bin:
    """The images whose confidence lies in (low, high]."""

    low: float
    high: float
    images: int
    confidence: float | None
    """Mean confidence; None, like the accuracy, where the bin is empty."""
    accuracy: float | None


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Returns the 95% interval of `correct` of `total` (Wilson 1927; recommended by Brown, Cai and DasGupta 2001)."""
    share, z2 = correct / total, NORMAL_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = NORMAL_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return (centre - half if correct else 0.0), (centre + half if correct < total else 1.0)


def confusion_matrix(logits: Tensor, labels: Tensor) -> list[list[int]] | None:
    """Logits (N, K) and labels int64 (N,) -> counts, a row for each label, a column for each prediction.

    Returns None for more than `MOST_CONFUSED` classes.
    """
    classes = logits.shape[1]
    if classes > MOST_CONFUSED:
        return None
    counts = torch.bincount(labels * classes + logits.argmax(dim=1), minlength=classes**2)
    return counts.reshape(classes, classes).tolist()


def class_scores(logits: Tensor, labels: Tensor, names: tuple[str, ...]) -> tuple[ClassScore, ...]:
    """Counts by class: logits (N, K), labels int64 (N,), and the names of the K classes."""
    predicted = logits.argmax(dim=1)
    counts = [torch.bincount(each, minlength=len(names)) for each in (labels[predicted == labels], labels, predicted)]
    rows = zip(names, *(count.tolist() for count in counts), strict=True)
    return tuple(ClassScore(name, of, hit / of if of else None, hit / to if to else None) for name, hit, of, to in rows)


def reliability(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Bin, ...]:
    """Bins images evenly by confidence, the largest probability: logits (N, classes), labels int64 (N,)."""
    confidence, predicted = (logits.double() / temperature).softmax(dim=1).max(dim=1)
    place = (torch.ceil(confidence * BINS).long() - 1).clamp(0, BINS - 1)
    counts = torch.bincount(place, minlength=BINS).tolist()
    hits = torch.bincount(place, (predicted == labels).double(), minlength=BINS).tolist()
    sums = torch.bincount(place, confidence, minlength=BINS).tolist()
    return tuple(
        Bin(i / BINS, (i + 1) / BINS, n, sums[i] / n if n else None, hits[i] / n if n else None)
        for i, n in enumerate(counts)
    )


def calibration_error(bins: tuple[Bin, ...]) -> float:
    """Returns the mean gap of accuracy and confidence, bins weighted by images (Guo et al. 2017, arXiv:1706.04599)."""
    total = sum(one.images for one in bins)
    return sum(one.images * abs(given(one.accuracy) - given(one.confidence)) for one in bins if one.images) / total


def negative_log_likelihood(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Returns the mean for logits (N, classes), divided by `temperature`, and labels int64 (N,)."""
    return F.cross_entropy(logits.double() / temperature, labels).item()


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Finds the likeliest temperature within `TEMPERATURES` for logits (N, classes) and labels int64 (N,).

    The negative log-likelihood is convex in b = 1 / temperature; its slope, the mean of `E_p[z] - z_label` with p =
    softmax(b z), is bisected almost to the last bit.
    """
    z = logits.double()
    z = z - z.gather(1, labels[:, None])
    low, high = (math.log(1 / temperature) for temperature in reversed(TEMPERATURES))
    for _ in range(50):
        middle = (low + high) / 2
        slope = ((math.exp(middle) * z).softmax(dim=1) * z).sum(dim=1).mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(-(low + high) / 2)
