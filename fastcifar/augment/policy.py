"""What is done to the images: a policy draws the parameters of each sample; an applier carries them out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcifar.augment.random import Key, Stream, below, draw


@dataclass(frozen=True, eq=False)
class Params:
    """One row a sample, on the CPU."""

    shift: Tensor
    """int64 (N, 2): how far the picture's window is moved down and right, in pixels; what it uncovers is 0 (black)."""
    flip: Tensor
    """bool (N,): whether the shifted picture is mirrored left to right."""

    def __len__(self) -> int:
        return len(self.flip)

    def matrix(self, width: int) -> Tensor:
        """The same as one affine map a sample, from output to input pixels, with corner-based coordinates: float32 (N, 2, 3).

        Mirroring maps x to width - x, and it comes after the shift: input x = (width - x or x) + shift.
        """
        flip = self.flip.to(torch.float32)
        matrix = torch.zeros(len(self), 2, 3)
        matrix[:, 0, 0] = 1 - 2 * flip
        matrix[:, 0, 2] = width * flip + self.shift[:, 1]
        matrix[:, 1, 1] = 1
        matrix[:, 1, 2] = self.shift[:, 0]
        return matrix


@dataclass(frozen=True)
class Policy:
    """A crop after zero padding, then a mirror image with a probability."""

    padding: int = 0
    """Pixels of padding on each side, from which a window of the image's own size is taken."""
    flip_probability: float = 0.0

    @property
    def changes_images(self) -> bool:
        return bool(self.padding or self.flip_probability)

    def sample(self, key: Key, index: Tensor) -> Params:
        """The parameters of the samples at `index`, int64 (N,) on the CPU, in the epoch that `key` names."""
        words = draw(key, Stream.CROP_AND_FLIP, index)
        shift = below(words[:, :2], 2 * self.padding + 1) - self.padding
        return Params(shift, words[:, 2] < round(self.flip_probability * 2**32))


def none() -> Policy:
    """The images as they are."""
    return Policy()


def standard() -> Policy:
    """A random crop after 4 pixels of zero padding, and a mirror image half of the time (He et al. 2015, section 4.2)."""
    return Policy(padding=4, flip_probability=0.5)
