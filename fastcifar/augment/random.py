"""Counter-based randomness: every draw is a function of (seed, epoch, sample, stream) alone.

So an augmented image does not depend on the batch size, the chunk size, the backend, the number of devices, or on where
a run was resumed. The generator is Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
as in Triton's `tl.randint4x`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85


class Stream(IntEnum):
    """The kinds of draws. Never reuse a number: that would change runs when they are repeated."""

    CROP_AND_FLIP = 0
    ALTERNATING_FLIP = 1
    AFFINE = 2
    GREYSCALE = 3
    ERASE = 4
    MIX = 5
    BRANCH = 6
    CHOICE = 7
    ORDER = 8
    DROPOUT = 9
    INTENSITY = 10


@dataclass(frozen=True)
class Key:
    """An epoch of a run: `seed` and `epoch`, both from 0 up to 2**32 - 1."""

    seed: int
    epoch: int


def philox(key: int, offset: Tensor) -> Tensor:
    """Four random 32-bit words for each offset, equal to `tl.randint4x(key, offset)`.

    `key` has 64 bits, and `offset` is int64 (N,), not negative.

    Returns:
        int64 (N, 4), each in [0, 2**32).
    """
    c0, c1 = offset & MASK, offset >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key & MASK, key >> 32 & MASK
    for _ in range(ROUNDS):
        a_high, a_low = multiply(MULTIPLIER_A, c0)
        b_high, b_low = multiply(MULTIPLIER_B, c2)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = k0 + WEYL_A & MASK, k1 + WEYL_B & MASK
    return torch.stack((c0, c1, c2, c3), dim=1)


def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product; int64 wraps around, and the mask removes the sign."""
    product = a * b
    return product >> 32 & MASK, product & MASK


def draw(key: Key, stream: Stream, index: Tensor, turn: int = 0) -> Tensor:
    """Four random 32-bit words for each sample index in the data set: int64 (N,) -> int64 (N, 4).

    `turn`, below 2**16, tells repeated draws of one stream apart.
    """
    return philox(key.epoch << 32 | key.seed, index | (turn << 8 | int(stream)) << 32)


def uniform(words: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) from 32-bit words: int64 -> float64 of the same shape."""
    return words.double() * 2.0**-32


def normal(words: Tensor) -> Tensor:
    """Standard normal numbers from 32-bit words, by inverting the distribution function: int64 -> float64."""
    return math.sqrt(2) * torch.erfinv(2 * (words.double() + 0.5) * 2.0**-32 - 1)


def below(words: Tensor, bound: int) -> Tensor:
    """Uniform integers in [0, bound) from 32-bit words by multiplication, with a bias below bound / 2**32: int64."""
    return words * bound >> 32


def epoch_seed(key: Key, stream: Stream) -> int:
    """A 63-bit seed for a generator of torch, from 0 up to 2**63 - 1."""
    first, second, *_ = draw(key, stream, torch.zeros(1, dtype=torch.int64))[0].tolist()
    return first << 31 | second >> 1
