"""AutoAugment, RandAugment and TrivialAugment as tables of choices; free of torch.

Values are what the operation does, in physical units, whatever the paper's or the library's scale of levels: see
`Operation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Operation(IntEnum):
    """What can be done to an image, each as PIL does it, and the unit of its value."""

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
    """An operation, how probably it is carried out, and its values, of which each is as likely."""

    operation: Operation
    probability: float = 1.0
    values: tuple[float, ...] = (0.0,)


@dataclass(frozen=True)
class Automatic:
    """In each of `rounds`, one branch is picked, all being as likely, and its choices are carried out in order."""

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
"""Operation, probability and level of 10: Cubuk et al. 2019, arXiv:1805.09501, table 7."""


def paper_values(operation: Operation, level: int) -> tuple[float, ...]:
    """What a level of 10 stands for in the AutoAugment authors' code for CIFAR-10."""
    if operation in (O.SHEAR_X, O.SHEAR_Y):
        return either(0.3 * level / 10)
    if operation in (O.TRANSLATE_X, O.TRANSLATE_Y):
        return either(float(level))
    if operation == O.ROTATE:
        return either(float(int(30 * level / 10)))
    if operation in ENHANCING:
        return (0.1 + 1.8 * level / 10,)
    return {O.SOLARIZE: (256.0 - int(256 * level / 10),), O.POSTERIZE: (4.0 - int(4 * level / 10),)}.get(
        operation, (0.0,)
    )


def torchvision_values(
    operation: Operation, level: float, *, shear: float, translate: tuple[float, float], rotate: float, enhance: float
) -> tuple[float, ...]:
    """What torchvision makes of a `level` from 0 to 1: the shares of the greatest values given, each with a random
    sign.
    """
    if operation in (O.SHEAR_X, O.SHEAR_Y):
        return either(shear * level)
    if operation in (O.TRANSLATE_X, O.TRANSLATE_Y):
        return either(float(int(translate[operation == O.TRANSLATE_Y] * level)))
    if operation == O.ROTATE:
        return either(rotate * level)
    if operation in ENHANCING:
        return tuple(1 + value for value in either(enhance * level))
    return (255 * (1 - level),) if operation == O.SOLARIZE else (0.0,)


def either(value: float) -> tuple[float, ...]:
    return (value, -value)


def torchvision_reach(size: tuple[int, int]) -> dict[str, float | tuple[float, float]]:
    """The greatest values of torchvision's AutoAugment and RandAugment for images of `size`, height and width."""
    height, width = size
    return {"shear": 0.3, "translate": (150 / 331 * width, 150 / 331 * height), "rotate": 30.0, "enhance": 0.9}


def autoaugment(size: tuple[int, int]) -> Automatic:
    """The CIFAR-10 policy with the authors' values, and grey (128) beyond the border."""
    branches = tuple(
        tuple(
            Choice(operation, probability, paper_values(operation, level))
            for operation, probability, level in sub_policy
        )
        for sub_policy in CIFAR10_SUB_POLICIES
    )
    return Automatic(branches, fill=128)


def autoaugment_tv(size: tuple[int, int]) -> Automatic:
    """The same sub-policies with torchvision's values: ten bins, enhancement of either sign, black beyond the
    border.
    """

    def values(operation: Operation, level: int) -> tuple[float, ...]:
        if operation == O.POSTERIZE:
            return (8.0 - round(level / (9 / 4)),)
        return torchvision_values(operation, level / 9, **torchvision_reach(size))

    branches = tuple(
        tuple(Choice(operation, probability, values(operation, level)) for operation, probability, level in sub_policy)
        for sub_policy in CIFAR10_SUB_POLICIES
    )
    return Automatic(branches)


WITHOUT_INVERT = tuple(operation for operation in Operation if operation != O.INVERT)
BINS = 31


def randaugment(size: tuple[int, int], rounds: int = 2, magnitude: int = 9) -> Automatic:
    """`rounds` operations of 14, all at level `magnitude` of 30: Cubuk et al. 2020, arXiv:1909.13719, with
    torchvision's values.
    """
    level = magnitude / (BINS - 1)

    def values(operation: Operation) -> tuple[float, ...]:
        if operation == O.POSTERIZE:
            return (8.0 - round(magnitude / ((BINS - 1) / 4)),)
        return torchvision_values(operation, level, **torchvision_reach(size))

    return Automatic(tuple((Choice(operation, 1.0, values(operation)),) for operation in WITHOUT_INVERT), rounds)


def trivialaugment(size: tuple[int, int]) -> Automatic:
    """One operation of 14 at a random level of 0 to 30, with wide values: Müller and Hutter 2021, arXiv:2103.10158,
    as in torchvision.
    """
    reach = {"shear": 0.99, "translate": (32.0, 32.0), "rotate": 135.0, "enhance": 0.99}

    def values(operation: Operation) -> tuple[float, ...]:
        if operation == O.POSTERIZE:
            return tuple(8.0 - round(level / ((BINS - 1) / 6)) for level in range(BINS))
        return tuple(
            value for level in range(BINS) for value in torchvision_values(operation, level / (BINS - 1), **reach)
        )

    return Automatic(tuple((Choice(operation, 1.0, values(operation)),) for operation in WITHOUT_INVERT))
