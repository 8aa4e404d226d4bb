"""Counter-based randomness: every draw is a function of (seed, epoch, sample, what is drawn), and of nothing else.

So an augmented image does not depend on the batch size, the chunk size, the backend, the number of devices, or on where a run was resumed.
The generator is Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), as in Triton's `tl.randint4x`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85


class Stream(IntEnum):
    """What is drawn. A number, once given, stays: giving one anew would change every run that is ever repeated."""

    CROP_AND_FLIP = 0


@dataclass(frozen=True)
class Key:
    """Names an epoch of a run: `seed` and `epoch`, both from 0 up to 2**32 - 1."""

    seed: int
    epoch: int


def philox(key: int, offset: Tensor) -> Tensor:
    """Four random 32-bit words for each offset, the bits of `tl.randint4x(key, offset)`.

    Args:
        key: 64 bits.
        offset: int64 (N,), not negative.

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
    """High and low 32 bits of the 64-bit product; the halves keep every intermediate within int64."""
    product_low = a * (b & 0xFFFF)
    product_high = a * (b >> 16)
    middle = product_high + (product_low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | product_low & 0xFFFF


def draw(key: Key, stream: Stream, index: Tensor) -> Tensor:
    """Four random 32-bit words for each sample: int64 (N,) indices within the data set -> int64 (N, 4)."""
    return philox(key.epoch << 32 | key.seed, index | int(stream) << 32)


def below(words: Tensor, bound: int) -> Tensor:
    """Uniform integers in [0, bound) from 32-bit words, by multiplication; int64 in, int64 out. The bias is below bound / 2**32."""
    return words * bound >> 32


def permutation(key: Key, count: int) -> Tensor:
    """The order of `count` samples in an epoch: int64 (count,), on the CPU."""
    mixed = philox(key.epoch << 32 | key.seed, torch.tensor([MASK << 31]))[0]
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(mixed[0]) << 31 | int(mixed[1]) >> 1))
