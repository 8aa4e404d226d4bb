"""Accuracy, intervals and calibration against closed forms and plainer code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastcifar.inference.metrics import (
    calibration_error,
    class_scores,
    confusion_matrix,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    wilson_interval,
)


@given(st.integers(1, 10**6).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_ends_of_the_interval_solve_its_equation(counts: tuple[int, int]) -> None:
    """At the ends the score test is just significant: (share - p)^2 = z^2 p (1 - p) / n."""
    correct, total = counts
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            assert (correct / total - p) ** 2 == pytest.approx(
                1.9599639845**2 * p * (1 - p) / total, rel=1e-6, abs=1e-12
            )


def test_confusion_and_classes_with_ties_to_the_lower_label() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0], [2.0, 2.0, 1.0], [0.0, 1.0, 1.0], [0.0, 2.0, 1.0], [5.0, 0.0, 5.0]])
    labels = torch.tensor([0, 1, 1, 1, 0])
    assert confusion_matrix(logits, labels) == [[2, 0, 0], [1, 2, 0], [0, 0, 0]]
    scores = class_scores(logits, labels, ("a", "b", "c"))
    assert [(one.name, one.images, one.recall, one.precision) for one in scores] == [
        ("a", 2, 1.0, 2 / 3),
        ("b", 3, 2 / 3, 1.0),
        ("c", 0, None, None),
    ]


def drawn(count: int, classes: int, temperature: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(count, classes, generator=generator)
    return logits, torch.multinomial((logits / temperature).softmax(1), 1, generator=generator).flatten()


@pytest.mark.parametrize(("classes", "temperature"), [(2, 1.0), (10, 1.0), (7, 2.5)])
def test_calibration_error_against_a_loop(classes: int, temperature: float) -> None:
    logits, labels = drawn(1013, classes, 1.7)
    shares = np.exp(logits.double().numpy() / temperature)
    shares /= shares.sum(axis=1, keepdims=True)
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == labels.numpy()
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    bins = reliability(logits, labels, temperature)
    assert sum(one.images for one in bins) == 1013
    assert calibration_error(bins) == pytest.approx(expected, rel=1e-9)


def test_certainty_falls_into_the_last_bin() -> None:
    bins = reliability(torch.tensor([[1000.0, 0.0], [1000.0, 0.0]]), torch.tensor([0, 1]))
    assert (bins[-1].images, bins[-1].confidence, bins[-1].accuracy) == (2, 1.0, 0.5)
    assert calibration_error(bins) == 0.5


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_the_temperature_is_the_likeliest_and_the_true_one(temperature: float) -> None:
    logits, labels = drawn(5_000, 10, temperature)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(temperature, rel=0.1)
    least = negative_log_likelihood(logits, labels, fitted)
    assert least == pytest.approx(F.cross_entropy(logits.double() / fitted, labels).item(), rel=1e-12)
    for factor in (0.999, 1.001):
        assert negative_log_likelihood(logits, labels, fitted * factor) > least


def test_the_temperature_stays_within_bounds() -> None:
    logits = torch.eye(4)
    assert fit_temperature(logits, torch.arange(4)) == pytest.approx(0.01, rel=1e-6)
    assert fit_temperature(logits, (torch.arange(4) + 1) % 4) == pytest.approx(100, rel=1e-6)
