from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.data.splits import validation_split
from fastcifar.errors import ConfigError


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=200), st.data(), st.integers(0, 2**32 - 1))
def test_splits_in_proportion(drawn: list[int], data: st.DataObject, seed: int) -> None:
    labels = torch.tensor(drawn)
    count = data.draw(st.integers(1, len(drawn) - 1))
    train, validation = validation_split(labels, count, seed, classes=8)
    assert train.dtype == validation.dtype == torch.int64
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(len(labels)))
    assert torch.equal(train, train.sort().values)
    assert torch.equal(validation, validation.sort().values)
    assert len(validation) == count
    proportional = labels.bincount(minlength=8) * count / len(labels)
    assert (labels[validation].bincount(minlength=8) - proportional).abs().max() < 1


def test_seed_decides() -> None:
    labels = torch.arange(1000) % 10
    first, again, other = (validation_split(labels, 100, seed, classes=10)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_larger_split_holds_the_smaller_one() -> None:
    labels = torch.arange(1000) % 10
    small, large = (set(validation_split(labels, count, 3, classes=10)[1].tolist()) for count in (100, 200))
    assert small < large


def test_samples_are_drawn_evenly() -> None:
    labels = torch.arange(1000) % 10
    positions = torch.cat([validation_split(labels, 100, seed, classes=10)[1] for seed in range(40)]).double()
    assert positions.mean() == pytest.approx(499.5, abs=20)


@pytest.mark.parametrize("count", [-1, 0, 100, 101])
def test_count_out_of_range(count: int) -> None:
    with pytest.raises(
        ConfigError, match=f"a validation split of {count} out of 100 images is impossible; choose 1 to 99"
    ):
        validation_split(torch.zeros(100, dtype=torch.int64), count, seed=0, classes=1)
