"""AutoAugment, RandAugment and TrivialAugment as tables of choices.

Values are in the physical units of each `Operation`, not in the levels of a paper or library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain

import torch


class Operation(IntEnum):
    """The operations on an image, each as in PIL, and the units of their values."""

    IDENTITY = 0
    SHEAR_X = 1  # pixels to the side for each pixel down, about the upper left corner
    SHEAR_Y = 2  # pixels down for each pixel to the side
    TRANSLATE_X = 3  # whole pixels to the right
    TRANSLATE_Y = 4  # whole pixels down
    ROTATE = 5  # degrees counter-clockwise about the centre
    AUTO_CONTRAST = 6
    INVERT = 7
    EQUALIZE = 8
    SOLARIZE = 9  # bytes from this value up are inverted
    POSTERIZE = 10  # bits kept
    CONTRAST = 11  # factor, 1 changes nothing
    COLOR = 12  # factor
    BRIGHTNESS = 13  # factor
    SHARPNESS = 14  # factor


GEOMETRIC = frozenset(
    {Operation.SHEAR_X, Operation.SHEAR_Y, Operation.TRANSLATE_X, Operation.TRANSLATE_Y, Operation.ROTATE}
)
ENHANCING = frozenset({Operation.CONTRAST, Operation.COLOR, Operation.BRIGHTNESS, Operation.SHARPNESS})
O = Operation  # noqa: E741


@dataclass(frozen=True)
class Choice:
    """An operation, its probability, and its values, each equally likely."""

    operation: Operation
    probability: float = 1.0
    values: tuple[float, ...] = (0.0,)


@dataclass(frozen=True)
class Automatic:
    """Picks one branch in each of `rounds`, all equally likely, and carries out its choices in order."""

    branches: tuple[tuple[Choice, ...], ...]
    rounds: int = 1
    fill: int = 0
    """Grey level beyond the border in rotation, shear and translation."""


CIFAR10_SUB_POLICIES: tuple[tuple[tuple[Operation, float, int], tuple[Operation, float, int]], ...] = (
    ((O.INVERT, 0.1, 7), (O.CONTRAST, 0.2, 6)),
    ((O.ROTATE, 0.7, 2), (O.TRANSLATE_X, 0.3, 9)),
    ((O.SHARPNESS, 0.8, 1), (O.SHARPNESS, 0.9, 3)),
    ((O.SHEAR_Y, 0.5, 8), (O.TRANSLATE_Y, 0.7, 9)),
    ((O.AUTO_CONTRAST, 0.5, 8), (O.EQUALIZE, 0.9, 2)),
    ((O.SHEAR_Y, 0.2, 7), (O.POSTERIZE, 0.3, 7)),
    ((O.COLOR, 0.4, 3), (O.BRIGHTNESS, 0.6, 7)),
    ((O.SHARPNESS, 0.3, 9), (O.BRIGHTNESS, 0.7, 9)),
    ((O.EQUALIZE, 0.6, 5), (O.EQUALIZE, 0.5, 1)),
    ((O.CONTRAST, 0.6, 7), (O.SHARPNESS, 0.6, 5)),
    ((O.COLOR, 0.7, 7), (O.TRANSLATE_X, 0.5, 8)),
    ((O.EQUALIZE, 0.3, 7), (O.AUTO_CONTRAST, 0.4, 8)),
    ((O.TRANSLATE_Y, 0.4, 3), (O.SHARPNESS, 0.2, 6)),
    ((O.BRIGHTNESS, 0.9, 6), (O.COLOR, 0.2, 8)),
    ((O.SOLARIZE, 0.5, 2), (O.INVERT, 0.0, 3)),
    ((O.EQUALIZE, 0.2, 0), (O.AUTO_CONTRAST, 0.6, 0)),
    ((O.EQUALIZE, 0.2, 8), (O.EQUALIZE, 0.6, 4)),
    ((O.COLOR, 0.9, 9), (O.EQUALIZE, 0.6, 6)),
    ((O.AUTO_CONTRAST, 0.8, 4), (O.SOLARIZE, 0.2, 8)),
    ((O.BRIGHTNESS, 0.1, 3), (O.COLOR, 0.7, 0)),
    ((O.SOLARIZE, 0.4, 5), (O.AUTO_CONTRAST, 0.9, 3)),
    ((O.TRANSLATE_Y, 0.9, 9), (O.TRANSLATE_Y, 0.7, 9)),
    ((O.AUTO_CONTRAST, 0.9, 2), (O.SOLARIZE, 0.8, 3)),
    ((O.EQUALIZE, 0.8, 8), (O.INVERT, 0.1, 3)),
    ((O.TRANSLATE_Y, 0.7, 9), (O.AUTO_CONTRAST, 0.9, 1)),
)
"""Operation, probability and level (of 10): Cubuk et al. 2019, arXiv:1805.09501, table 7."""


Bins = tuple[tuple[float, ...], ...]
"""The values of an operation in each bin."""
WITHOUT_INVERT = tuple(operation for operation in Operation if operation != O.INVERT)
LEVELS = 31
"""The levels of RandAugment and TrivialAugment, 0 to 30."""


def either(value: float) -> tuple[float, ...]:
    return (value, -value)


def paper_values(operation: Operation, level: int) -> tuple[float, ...]:
    """The values of an operation at a level (of 10) in the AutoAugment authors' code for CIFAR-10."""
    values = {
        O.SHEAR_X: either(0.3 * level / 10),
        O.SHEAR_Y: either(0.3 * level / 10),
        O.TRANSLATE_X: either(float(level)),
        O.TRANSLATE_Y: either(float(level)),
        O.ROTATE: either(float(int(30 * level / 10))),
        O.SOLARIZE: (256.0 - int(256 * level / 10),),
        O.POSTERIZE: (4.0 - int(4 * level / 10),),
        **dict.fromkeys(ENHANCING, (0.1 + 1.8 * level / 10,)),
    }
    return values.get(operation, (0.0,))


def torchvision_values(
    bins: int, shear: float, translate: tuple[float, float], rotate: float, enhance: float, posterize: int
) -> dict[Operation, Bins]:
    """The values of each operation in each of torchvision's bins: its own magnitudes, in float32, to the bit.

    Args:
        bins: the number of bins.
        shear: the magnitude in the last bin, as are the others.
        translate: across and down, in pixels, which are cut to whole ones.
        rotate: in degrees.
        enhance: the deviation of the factor from 1, either way.
        posterize: bits removed.
    """

    def up_to(last: float, values: Callable[[float], tuple[float, ...]]) -> Bins:
        return tuple(values(magnitude) for magnitude in torch.linspace(0.0, last, bins).tolist())

    def whole(magnitude: float) -> tuple[float, ...]:
        return either(float(int(magnitude)))

    removed = (torch.arange(bins) / ((bins - 1) / posterize)).round()
    return {
        **dict.fromkeys(Operation, ((0.0,),) * bins),
        **dict.fromkeys(ENHANCING, up_to(enhance, lambda magnitude: (1 + magnitude, 1 - magnitude))),
        **dict.fromkeys((O.SHEAR_X, O.SHEAR_Y), up_to(shear, either)),
        O.TRANSLATE_X: up_to(translate[0], whole),
        O.TRANSLATE_Y: up_to(translate[1], whole),
        O.ROTATE: up_to(rotate, either),
        O.SOLARIZE: tuple((threshold,) for threshold in torch.linspace(255.0, 0.0, bins).tolist()),
        O.POSTERIZE: tuple((bits,) for bits in (8 - removed).tolist()),
    }


def common_values(size: tuple[int, int], bins: int) -> dict[Operation, Bins]:
    """The values in torchvision's AutoAugment and RandAugment for images of `size`, height and width."""
    height, width = size
    return torchvision_values(bins, 0.3, (150.0 / 331.0 * width, 150.0 / 331.0 * height), 30.0, 0.9, 4)


def sub_policies(values: Callable[[Operation, int], tuple[float, ...]]) -> tuple[tuple[Choice, ...], ...]:
    """The branches of `CIFAR10_SUB_POLICIES`, with `values` for their levels."""
    return tuple(
        tuple(Choice(operation, probability, values(operation, level)) for operation, probability, level in sub_policy)
        for sub_policy in CIFAR10_SUB_POLICIES
    )


def autoaugment(size: tuple[int, int]) -> Automatic:
    """The CIFAR-10 policy with the authors' values and a grey (128) border."""
    return Automatic(sub_policies(paper_values), fill=128)


def autoaugment_tv(size: tuple[int, int]) -> Automatic:
    """The same sub-policies with torchvision's values: ten bins, enhancement of either sign, black border."""
    values = common_values(size, 10)
    return Automatic(sub_policies(lambda operation, level: values[operation][level]))


def randaugment(size: tuple[int, int], rounds: int = 2, magnitude: int = 9) -> Automatic:
    """Picks `rounds` of 14 operations, all at level `magnitude` of 30, with torchvision's values.

    Source: Cubuk et al. 2020, arXiv:1909.13719.
    """
    values = common_values(size, LEVELS)
    return Automatic(tuple((Choice(one, 1.0, values[one][magnitude]),) for one in WITHOUT_INVERT), rounds)


def trivialaugment(size: tuple[int, int]) -> Automatic:
    """Picks one of 14 operations at a random level of 0 to 30, with wide values, as in torchvision.

    Source: Müller and Hutter 2021, arXiv:2103.10158.
    """
    values = torchvision_values(LEVELS, 0.99, (32.0, 32.0), 135.0, 0.99, 6)
    return Automatic(tuple((Choice(one, 1.0, tuple(chain(*values[one]))),) for one in WITHOUT_INVERT))
