"""Draws what a policy does to each sample.

Decisions and maps are computed on the CPU, with one arithmetic for all devices and without waiting for any.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastcifar.augment import automatic, geometry
from fastcifar.augment.automatic import Automatic, Operation
from fastcifar.augment.policy import Erase, Mix, Policy
from fastcifar.augment.random import Key, Stream, below, draw, normal, uniform


@dataclass(frozen=True, eq=False)
class Slot:
    """One turn of an automatic policy, with an operation for each sample."""

    operation: Tensor
    """int64 (N,), values of `automatic.Operation`."""
    value: Tensor
    """float64 (N,), in the operation's unit."""
    warp: Tensor
    """int32 (N, 6): the fixed-point map of geometric operations, the identity for all others."""
    fill: int
    """Grey level beyond the border."""


@dataclass(frozen=True, eq=False)
class Mixing:
    """The partner of each sample, and how they are mixed."""

    partner: Tensor
    """int64 (N,): index in the data set; the partner is augmented as in the same epoch."""
    share: Tensor
    """int64 (N,): the share of the sample itself, of 256."""
    box: Tensor | None
    """int64 (N, 4): top, left, bottom, right of the part pasted from the partner (CutMix); None for mixup."""


@dataclass(frozen=True, eq=False)
class Params:
    """The parameters of N samples, a row each, in order of use; None or empty where unused. All are on the CPU."""

    warp: Tensor | None = None
    """int32 (N, 6): the map from output to input pixels (`geometry.fixed_point`)."""
    slots: tuple[Slot, ...] = ()
    grey: Tensor | None = None
    """bool (N,)."""
    intensity: Tensor | None = None
    """float64 (N, 3): multiples of the data set's colour axes to add."""
    boxes: Tensor | None = None
    """int32 (N, K, 4): top, left, bottom, right of painted squares, clipped to the image; empty ones have no height."""
    mixing: Mixing | None = None


def sample(policy: Policy, key: Key, index: Tensor, size: tuple[int, int], count: int) -> Params:
    """Draws the parameters of some samples in an epoch.

    `index`, int64 (N,) on the CPU, has the samples' places in the data set; `size` is height and width; mixing takes
    partners from `count` images.
    """
    return Params(
        warp=sample_warp(policy, key, index, size) if policy.warps else None,
        slots=sample_automatic(policy, key, index, size),
        grey=chance(draw(key, Stream.GREYSCALE, index)[:, 0], policy.greyscale) if policy.greyscale else None,
        intensity=policy.intensity * normal(draw(key, Stream.INTENSITY, index)[:, :3]) if policy.intensity else None,
        boxes=sample_boxes(policy.erase, key, index, size) if policy.erase else None,
        mixing=sample_mixing(policy.mix, key, index, size, count) if policy.mix else None,
    )


def chance(words: Tensor, probability: float | Tensor) -> Tensor:
    """True with `probability`: 32-bit words, int64 (N,) -> bool (N,)."""
    return words.double() < probability * 2.0**32


def sample_warp(policy: Policy, key: Key, index: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop, mirror, then rotation, shear and translation about the centre, as one map: int32 (N, 6)."""
    height, width = size
    centre = (width / 2, height / 2)
    words = draw(key, Stream.CROP_AND_FLIP, index)
    shift = (below(words[:, :2], 2 * policy.crop + 1) - policy.crop).double()
    maps = [
        geometry.translation(shift[:, 1], shift[:, 0]),
        geometry.mirror(sample_flip(policy, key, index, words[:, 2]), width),
    ]
    if policy.turns:
        maps.append(geometry.rotation(90.0 * below(words[:, 3], 4).double(), centre))
    if policy.rotate or policy.translate or policy.shear:
        angle, across, down, slant = (2 * uniform(draw(key, Stream.AFFINE, index)) - 1).unbind(1)
        away = torch.round(across * policy.translate * width), torch.round(down * policy.translate * height)
        tangent = torch.tan(slant * policy.shear * torch.pi / 180)
        maps += [
            geometry.shear(tangent, torch.zeros_like(tangent), centre),
            geometry.rotation(angle * policy.rotate, centre),
            geometry.translation(*away),
        ]
    return geometry.fixed_point(reduce(torch.matmul, maps))


def sample_flip(policy: Policy, key: Key, index: Tensor, word: Tensor) -> Tensor:
    """Which samples to mirror, bool (N,). Alternating mirrors use one draw for all epochs."""
    if policy.alternating:
        first = draw(Key(key.seed, 0), Stream.ALTERNATING_FLIP, index)[:, 0] & 1
        return (first + key.epoch) % 2 == 1
    return chance(word, policy.flip)


def sample_automatic(policy: Policy, key: Key, index: Tensor, size: tuple[int, int]) -> tuple[Slot, ...]:
    """The turns of the automatic policy: as many as rounds times choices in a branch."""
    if policy.automatic is None:
        return ()
    table = automatic_table(policy.automatic, size)
    slots = []
    for turn, choice in product(range(table.rounds), range(len(table.branches[0]))):
        branch = below(draw(key, Stream.BRANCH, index, turn)[:, 0], len(table.branches))
        words = draw(key, Stream.CHOICE, index, turn << 8 | choice)
        slots.append(sample_slot(table, branch, choice, words, size))
    return tuple(slots)


def automatic_table(policy: tuple[str, tuple[int, ...]], size: tuple[int, int]) -> Automatic:
    """The automatic policy of this name and numbers, for images of `size`."""
    name, numbers = policy
    return getattr(automatic, name)(size, *numbers)


def sample_slot(table: Automatic, branch: Tensor, choice: int, words: Tensor, size: tuple[int, int]) -> Slot:
    """Slot number `choice` of each sample's branch, int64 (N,), from 32-bit words (N, 4)."""
    choices = [branches[choice] for branches in table.branches]
    values = pad_sequence([torch.tensor(option.values, dtype=torch.float64) for option in choices], batch_first=True)
    lengths = torch.tensor([len(option.values) for option in choices])
    probability = torch.tensor([option.probability for option in choices], dtype=torch.float64)
    operations = torch.tensor([int(option.operation) for option in choices])
    happens = chance(words[:, 0], probability[branch])
    operation = torch.where(happens, operations[branch], int(Operation.IDENTITY))
    value = values[branch, words[:, 1] * lengths[branch] >> 32] * happens
    return Slot(operation, value, slot_warp(operation, value, size), table.fill)


def slot_warp(operation: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps of the geometric operations, the identity for others: int64 (N,), float64 (N,) -> int32 (N, 6)."""
    height, width = size

    def only(kind: Operation) -> Tensor:
        return torch.where(operation == kind, value, 0.0)

    maps = [
        geometry.shear(only(Operation.SHEAR_X), only(Operation.SHEAR_Y), (0.0, 0.0)),
        geometry.translation(-only(Operation.TRANSLATE_X), -only(Operation.TRANSLATE_Y)),
        geometry.rotation(only(Operation.ROTATE), (width / 2, height / 2)),
    ]
    return geometry.fixed_point(reduce(torch.matmul, maps))


def sample_boxes(erase: Erase, key: Key, index: Tensor, size: tuple[int, int]) -> Tensor:
    """Draws the squares to paint: int32 (N, K, 4)."""
    height, width = size
    side = torch.where(chance(draw(key, Stream.ERASE, index)[:, 0], erase.probability), erase.size, 0)
    boxes = []
    for square in range(erase.count):
        words = draw(key, Stream.ERASE, index, square + 1)
        if erase.inside:
            top = below(words[:, 0], max(1, height - erase.size + 1))
            left = below(words[:, 1], max(1, width - erase.size + 1))
        else:
            top, left = below(words[:, 0], height) - erase.size // 2, below(words[:, 1], width) - erase.size // 2
        boxes.append(clipped_box(top, left, side, side, size))
    return torch.stack(boxes, dim=1).int()


def clipped_box(top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: tuple[int, int]) -> Tensor:
    """Clips boxes to the image: int64 (N,) each -> (N, 4), top, left, bottom, right."""
    corners = torch.stack((top, left, top + height, left + width), dim=1)
    return torch.minimum(corners.clamp(min=0), torch.tensor((*size, *size)))


def sample_mixing(mix: Mix, key: Key, index: Tensor, size: tuple[int, int], count: int) -> Mixing:
    """Draws partners and shares (Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899).

    The partner is any image of the data set, not one of the batch, so that the mixture does not depend on the batch
    size.
    """
    height, width = size
    words = draw(key, Stream.MIX, index)
    share = beta(uniform(words[:, 1]), mix.alpha)
    partner = below(words[:, 0], count)
    if mix.kind == "mixup":
        return Mixing(partner, torch.round(share * 256).long(), None)
    side = (1 - share).sqrt()
    box_height, box_width = (side * height).long(), (side * width).long()
    top, left = below(words[:, 2], height) - box_height // 2, below(words[:, 3], width) - box_width // 2
    box = clipped_box(top, left, box_height, box_width, size)
    pasted = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    return Mixing(partner, torch.round(256 * (1 - pasted / (height * width))).long(), box)


def beta(uniforms: Tensor, alpha: float) -> Tensor:
    """Draws from Beta(alpha, alpha) by inverting its distribution function: float64 (N,) in [0, 1) -> float64 (N,).

    With x = sin^2(t), the density becomes 2 (sin t cos t)^(2 alpha - 1) dt, whose integral is summed over a fine grid
    of t.
    """
    if alpha == 1:
        return uniforms
    steps = 1 << 14
    t = (np.arange(steps) + 0.5) * (np.pi / 2 / steps)
    mass = (np.sin(t) * np.cos(t)) ** (2 * alpha - 1)
    distribution = np.concatenate(([0.0], np.cumsum(mass))) / mass.sum()
    angle = np.interp(uniforms.numpy(), distribution, np.linspace(0, np.pi / 2, steps + 1))
    return torch.from_numpy(np.sin(angle) ** 2)
