"""Augmentation: policies say what, `random` says when and how much, the appliers do it. The maps here are torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcifar.errors import ConfigError, unknown
from fastcifar.registry import load

if TYPE_CHECKING:
    from fastcifar.augment.policy import Policy
    from fastcifar.data.image_set import ImageSet

POLICIES: dict[str, str] = {
    "none": "fastcifar.augment.policy:none",
    "standard": "fastcifar.augment.policy:standard",
}

BACKENDS: dict[str, str] = {
    "torch": "fastcifar.augment.torch_apply:TorchApplier",
    "dali": "fastcifar.augment.dali_apply:DaliApplier",
}

NORMALIZATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]] | None] = {
    "true": None,
    "kuangliu": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation a channel, as fractions of 255; `true` takes the data set's own.

`kuangliu` is reports 3 and 4's: its deviations are those of single images, averaged. `none` only scales to [0, 1].
"""


def build_policy(name: str) -> Policy:
    """The augmentation policy `name`. Raises ConfigError where there is none."""
    if name not in POLICIES:
        raise ConfigError(unknown("augmentation", name, POLICIES))
    return load(POLICIES[name])()


def normalization(name: str, dataset: ImageSet) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of the preset `name` for `dataset`. Raises ConfigError where there is no such preset."""
    if name not in NORMALIZATIONS:
        raise ConfigError(unknown("normalisation", name, NORMALIZATIONS))
    return NORMALIZATIONS[name] or (dataset.mean, dataset.std)
