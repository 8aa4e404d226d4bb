from __future__ import annotations

import pytest
import torch
from fake_cifar import statistics
from torch.nn.functional import cross_entropy

from fastcifar.data.image_set import ImageSet
from fastcifar.data.synthetic import SPLITS, synthetic

DIGESTS = {
    "train": "4ded6fa3e21231af4214df21dbfd5d2cd4f549a84777320ee47bceb365de970d",
    "test": "1378db357d6cf824ebf58713e89fe12fb029fe6f91f775ef56377a18a2bf0759",
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, ImageSet]:
    return {split: synthetic(split) for split in SPLITS}


def test_the_same_bytes_everywhere(drawn: dict[str, ImageSet]) -> None:
    assert {split: dataset.digest() for split, dataset in drawn.items()} == DIGESTS
    for split, dataset in drawn.items():
        assert dataset.labels.bincount().tolist() == [SPLITS[split] // 10] * 10


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
