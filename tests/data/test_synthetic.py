from __future__ import annotations

import hashlib
import time

import pytest
import torch
from fake_cifar import statistics
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from fastcifar.data.image_set import ImageSet
from fastcifar.data.synthetic import SPLITS, synthetic
from fastcifar.errors import DataError

DIGESTS = {
    "train": "da23ac675263a13796dd5ce56a90f4d9b62dc366790b8a3378f84835c7147eab",
    "test": "aa23f1225b5893200c7102a9a1460ac2bf1ce2bb89a2c39598639109d608ee6a",
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, ImageSet]:
    return {split: synthetic(split) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_bytes_everywhere(split: str, drawn: dict[str, ImageSet]) -> None:
    content = drawn[split].images.numpy().tobytes() + drawn[split].labels.numpy().astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest() == DIGESTS[split]


@pytest.mark.parametrize(("split", "count"), [("train", 10_000), ("test", 2_000)])
def test_form_and_balance(split: str, count: int, drawn: dict[str, ImageSet]) -> None:
    dataset = drawn[split]
    assert dataset.images.shape == (count, 32, 32, 3)
    assert dataset.images.is_contiguous()
    assert dataset.labels.bincount().tolist() == [count // 10] * 10
    assert len(set(dataset.classes)) == 10
    assert len(dataset.labels[:100].unique()) == 10


def test_no_image_twice(drawn: dict[str, ImageSet]) -> None:
    images = [image.tobytes() for dataset in drawn.values() for image in dataset.images.numpy()]
    assert len(set(images)) == len(images)


def test_stated_statistics(drawn: dict[str, ImageSet]) -> None:
    mean, deviation = statistics(drawn["train"].images)
    assert mean == pytest.approx(drawn["train"].mean, abs=5e-5)
    assert deviation == pytest.approx(drawn["train"].std, abs=5e-5)
    assert (drawn["test"].mean, drawn["test"].std) == (drawn["train"].mean, drawn["train"].std)


def test_drawing_takes_no_time() -> None:
    began = time.process_time()
    for split in SPLITS:
        synthetic(split)
    assert time.process_time() - began < 4.0  # under a second on a quiet core


def test_unknown_split() -> None:
    with pytest.raises(DataError, match="unknown split 'validation'"):
        synthetic("validation")


def pixels(dataset: ImageSet) -> Tensor:
    """Centred pixels and a constant, float32 (N, 3073)."""
    flat = dataset.images.flatten(1).float() / 255 - 0.5
    return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def test_ridge_regression_does_not_solve_it(drawn: dict[str, ImageSet]) -> None:
    inputs, targets = pixels(drawn["train"]), one_hot(drawn["train"].labels).float()
    covariance, correlation = inputs.T @ inputs, inputs.T @ targets
    for penalty in (10.0, 1e3, 1e4):
        weights = torch.linalg.solve(covariance + penalty * torch.eye(len(covariance)), correlation)
        assert 0.08 < accuracy(pixels(drawn["test"]) @ weights, drawn["test"].labels) < 0.6


def test_logistic_regression_does_not_solve_it(drawn: dict[str, ImageSet]) -> None:
    torch.manual_seed(0)
    inputs, labels = pixels(drawn["train"]), drawn["train"].labels
    weights = torch.zeros(inputs.shape[1], 10, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=1e-3)
    for _ in range(3):
        for batch in torch.randperm(len(inputs)).split(250):
            optimizer.zero_grad()
            cross_entropy(inputs[batch] @ weights, labels[batch]).backward()
            optimizer.step()
    assert 0.08 < accuracy(pixels(drawn["test"]) @ weights, drawn["test"].labels) < 0.6
