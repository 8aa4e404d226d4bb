"""Sets samples of the training set aside for validation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcifar.errors import ConfigError


def validation_split(labels: Tensor, count: int, seed: int, classes: int) -> tuple[Tensor, Tensor]:
    """Splits a data set in two, each class in proportion: (train_index, validation_index).

    A class of n among N samples gives ``count * n / N`` to validation, rounded up for the classes with the largest
    remainders (the lower label where they tie), so that no class is off by as much as one. Equal arguments give equal
    indices.

    Args:
        labels: int64 (N,), each in [0, classes).
        count: samples to set aside, 1 to N - 1.
        seed: of the draw within each class.

    Returns:
        int64 (N - count,) and int64 (count,), each in ascending order, on the CPU.

    Raises:
        ConfigError: `count` leaves either part empty.
    """
    labels = labels.cpu()
    if not 0 < count < len(labels):
        raise ConfigError(
            f"a validation split of {count} out of {len(labels)} images is impossible; choose 1 to {len(labels) - 1}."
        )
    share = torch.bincount(labels, minlength=classes) * count
    quota = share // len(labels)
    by_remainder = torch.argsort(share % len(labels), descending=True, stable=True)
    quota[by_remainder[: count - int(quota.sum())]] += 1

    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        chosen[members[order[: quota[label]]]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
