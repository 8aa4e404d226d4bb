from __future__ import annotations

import hashlib

import pytest
import torch
from fake_cifar import statistics
from torch.nn.functional import cross_entropy

from fastcifar.data.image_set import ImageSet
from fastcifar.data.synthetic import SPLITS, synthetic

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


def test_logistic_regression_does_not_solve_it(drawn: dict[str, ImageSet]) -> None:
    """No other weights of single pixels solve it either: the class lies in the form alone."""
    torch.manual_seed(0)
    inputs, held_out = (drawn[split].images.flatten(1).float() / 255 - 0.5 for split in SPLITS)
    labels, weights = drawn["train"].labels, torch.zeros(3072, 10, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=1e-3)
    for _ in range(3):
        for batch in torch.randperm(len(inputs)).split(250):
            optimizer.zero_grad()
            cross_entropy(inputs[batch] @ weights, labels[batch]).backward()
            optimizer.step()
    accuracy = ((held_out @ weights).argmax(1) == drawn["test"].labels).float().mean().item()
    assert 0.08 < accuracy < 0.6
