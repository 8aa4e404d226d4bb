"""Compares augmented images with torchvision's, which computes the magnitudes itself from the bins that were drawn."""

from __future__ import annotations

from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, autoaugment

from fastcifar.augment import automatic
from fastcifar.augment.automatic import Operation
from fastcifar.augment.normalize import Normalization
from fastcifar.augment.policy import parse
from fastcifar.augment.random import Key
from fastcifar.augment.sampling import sample
from fastcifar.augment.torch_apply import TorchApplier
from fastcifar.data.synthetic import synthetic

from .harness import Attack, Trial

IMAGES, SIZE = 50_000, (32, 32)
THEIRS = autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy.CIFAR10)
POLICIES = {
    "autoaugment_tv": (THEIRS._augmentation_space(10, SIZE), [bin_ for *_, bin_ in chain(*THEIRS.policies)]),
    "randaugment": (autoaugment.RandAugment()._augmentation_space(31, SIZE), [9] * 14),
    "trivialaugment": (autoaugment.TrivialAugmentWide()._augmentation_space(31), [slice(None)] * 14),
}
"""torchvision's magnitudes by operation, whether they have either sign, and the bins of each choice in our table."""


def name_of(operation: int) -> str:
    return "".join(part.capitalize() for part in Operation(operation).name.split("_"))


@cache
def magnitudes(policy: str) -> dict[tuple[str, float], float]:
    """torchvision's magnitude for each operation, by its name and the value that we draw for it."""
    space, bins = POLICIES[policy]
    choices = chain(*getattr(automatic, policy)(SIZE).branches)
    found = {("Identity", 0.0): 0.0}
    for choice, which in zip(choices, bins, strict=True):
        name = name_of(choice.operation)
        levels, signed = space[name]
        signs = (1, -1) if signed else (1,)
        theirs = (
            [sign * level for level in levels[which].reshape(-1).tolist() for sign in signs] if levels.ndim else [0.0]
        )
        found |= {(name, value): level for value, level in zip(choice.values, theirs, strict=levels.ndim > 0)}
    return found


drawn_images = cache(synthetic)


def trial(policy: str, number: int, folder: Path) -> str | None:
    dataset, parsed = drawn_images(), parse(policy)
    epoch, place = divmod(number, len(dataset))
    index = torch.tensor([place])
    params = sample(parsed, Key(0, epoch), index, SIZE, len(dataset))
    applier = TorchApplier(dataset, parsed, Normalization(dataset.mean, dataset.std), torch.uint8, 1)
    picture, steps = Image.fromarray(dataset.images[place].numpy()), []
    for slot in params.slots:
        name, value = name_of(int(slot.operation)), float(slot.value)
        steps.append(f"{name} {value!r}")
        magnitude = magnitudes(policy)[name, value]
        picture = autoaugment._apply_op(picture, name, magnitude, InterpolationMode.NEAREST, [0, 0, 0])
    same = np.array_equal(applier.apply(index, params)[0], np.asarray(picture))
    return None if same else f"{', '.join(steps)} differs"


def images(place: Path) -> dict[str, Trial]:
    """Takes the policies in turn."""
    policies = ((number, list(POLICIES)[number % len(POLICIES)]) for number in range(IMAGES))
    return {f"{policy} of image {number}": partial(trial, policy, number) for number, policy in policies}


ATTACKS = (Attack("images as torchvision augments them", images, short=300, middle=4500),)
