"""The common form of all data sets: every image in memory as bytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastcifar.data import IMAGE_SIZES
from fastcifar.errors import DataError

LONGEST_NAME = 200
"""Most characters in the name of a class."""

Three = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their labels, whole and uncompressed.

    Raises:
        DataError: a field has the wrong type, shape or range; the sentence names it.
    """

    images: Tensor
    """uint8 (N, H, W, 3), RGB."""
    labels: Tensor
    """int64 (N,), each in [0, len(classes))."""
    classes: tuple[str, ...]
    """Class names, by label."""
    mean: Three
    """Mean of each channel, as a fraction of 255."""
    std: Three
    """Standard deviation of each channel over all pixels, as a fraction of 255."""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
            raise DataError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (N, H, W, 3).")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({len(images)},).")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise DataError(
                f"labels run from {int(labels.min())} to {int(labels.max())}; expected 0 to {len(self.classes) - 1}."
            )
        check_classes(self.classes)

    @staticmethod
    def of(images: ArrayLike, labels: ArrayLike, classes: Sequence[str] | None = None) -> ImageSet:
        """Builds a set from anything that converts to arrays; mean and deviation are computed.

        Args:
            images: uint8 (N, H, W, 3), RGB.
            labels: whole numbers (N,), from 0 up.
            classes: their names; the numbers themselves by default.

        Raises:
            DataError: a wrong type, shape or range.
        """
        pixels = torch.as_tensor(images)
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[3] != 3 or not pixels.numel():
            raise DataError(
                f"images are {pixels.dtype} {tuple(pixels.shape)}; expected uint8 (N, H, W, 3), at least one."
            )
        numbers = torch.as_tensor(labels).to(torch.int64)
        names = tuple(classes) if classes is not None else tuple(map(str, range(int(numbers.max()) + 1)))
        mean, std = channel_statistics(pixels)
        return ImageSet(pixels.contiguous(), numbers, names, mean, three(max(value, 1 / 255) for value in std))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        _, height, width, _ = self.images.shape
        return height, width

    @property
    def image_size(self) -> int:
        """Pixels a side. Raises DataError where no network takes such images: not square, or too small or large."""
        height, width = self.size
        if height != width or height not in IMAGE_SIZES:
            raise DataError(
                f"networks take square images of {IMAGE_SIZES.start} to {IMAGE_SIZES.stop - 1} pixels a side, and "
                f"these are {width}x{height}; crop or resize them, or give pictures as a folder, PATH@32."
            )
        return height

    def __repr__(self) -> str:
        height, width = self.size
        return (
            f"ImageSet({len(self):,} images of {width}x{height}, {len(self.classes)} classes, on {self.images.device})"
        )

    def digest(self) -> str:
        """A SHA-256 of shape, images and labels, in hexadecimal, the same on every device."""
        pieces = (*self.images.cpu().flatten().split(2**24), self.labels.cpu())
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(lambda piece: hashlib.sha256(piece.contiguous().numpy()).hexdigest(), pieces)
            return hashlib.sha256(repr((tuple(self.images.shape), *hashes)).encode()).hexdigest()

    def subset(self, index: Tensor) -> ImageSet:
        """The samples at `index`, int64 (M,), in that order, with the same classes and statistics."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with its tensors on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def check_classes(names: Sequence[str]) -> None:
    """Raises DataError where a name cannot be shown or written everywhere, or stands for two classes."""
    for name in names:
        if not (isinstance(name, str) and name.isprintable() and name.strip() and len(name) <= LONGEST_NAME):
            expected = f"1 to {LONGEST_NAME} characters that can be printed"
            raise DataError(f"a class is called {str(name)[:40]!a}; give it a name of {expected}.")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"two classes are called {twice!r}; give each a name of its own.")


def three(values: Iterable[float]) -> Three:
    red, green, blue = values
    return red, green, blue


def channel_statistics(images: Tensor) -> tuple[Three, Three]:
    """Mean and standard deviation of each channel of uint8 (N, H, W, 3), as fractions of 255, in float64."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(3)]).double()
    share /= images.numel() / 3
    mean = (share * levels).sum(1)
    std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    return three(mean.tolist()), three(std.tolist())
