"""Data sets from arrays: a .npz file, or a folder of .npy files. Pickled objects are never loaded."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fastcifar.data import SPLITS
from fastcifar.data.image_set import ImageSet, Three, channel_statistics, three
from fastcifar.data.memory import check_memory
from fastcifar.errors import DataError, reason

KINDS = ("images", "labels")
BYTES_OF_A_STRING = 100
"""What a short string takes in Python, beside its place in the array."""
LONGEST_HEADER = 2**14
"""Bytes that are read for a header: numpy's have about 128, and a hostile file may claim gigabytes."""


@dataclass(frozen=True)
class Header:
    """What a .npy file says of its array."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def read_arrays(path: Path, split: str) -> ImageSet:
    """Reads ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` and, if present, ``classes``.

    Images are uint8 (N, H, W, 3), of one size in both splits. Labels are integers (N,), from 0 to K - 1, where K counts
    the names in ``classes``, or else the different train labels; classes without names are called by their numbers.
    What the headers say is checked before any array is read.

    Returns:
        images uint8 (N, H, W, 3), contiguous; labels int64 (N,); mean and std of the train split.

    Raises:
        DataError: an array is missing, damaged, pickled, too large for the memory, or has another type, shape or range;
        the sentence names it.
    """
    headers = {name: read_header(path, name) for name in (f"{part}_{kind}" for part in SPLITS for kind in KINDS)}
    check_headers(path, headers)
    labels = {part: load_array(path, f"{part}_labels").astype(np.int64) for part in SPLITS}
    classes = class_names(path, labels["train"])
    count = len(classes)
    for part in SPLITS:
        low, high = labels[part].min(), labels[part].max()
        if not 0 <= low <= high < count:
            found = f"{part}_labels of {path} run from {low} to {high}"
            raise DataError(f"{found}; number the {count} classes 0 to {count - 1}.")
    images = {part: load_images(path, part) for part in {"train", split}}
    mean, std = rounded_statistics(images["train"], path)
    return ImageSet(images[split], torch.from_numpy(labels[split]), classes, mean, std)


def check_headers(path: Path, headers: dict[str, Header]) -> None:
    """Raises DataError where the images and labels are of the wrong type or shape, or too large for the memory."""
    for part in SPLITS:
        images, labels = (headers[f"{part}_{kind}"] for kind in KINDS)
        check_images(path, f"{part}_images", images)
        if labels.dtype.kind not in "iu" or len(labels.shape) != 1:
            found = f"{part}_labels of {path} are {labels}"
            raise DataError(f"{found}; expected integers (N,), the class of each image.")
        if labels.shape[0] != images.shape[0]:
            found = f"{path} has {images.shape[0]} {part}_images and {labels.shape[0]} {part}_labels"
            raise DataError(f"{found}; save one label for each image.")
    sizes = [headers[f"{part}_images"].shape for part in SPLITS]
    if sizes[0][1:] != sizes[1][1:]:
        found = f"{path} has images of different sizes, {sizes[0]} in train_images and {sizes[1]} in test_images"
        raise DataError(f"{found}; save them in one size.")
    # Counting the levels of a channel takes a copy of it; labels become 8 bytes each, twice.
    check_memory(sum(header.bytes * 4 // 3 + 16 * header.shape[0] for header in headers.values()), f"reading {path}")


def check_images(path: Path, name: str, images: Header) -> None:
    """Raises DataError where they are not uint8 (N, H, W, 3), with N, H and W at least 1."""
    shape, found = images.shape, f"{name} of {path} are {images}"
    if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
        save = f"numpy.repeat({name}.reshape(-1, {shape[1]}, {shape[2]}, 1), 3, axis=3)"
        raise DataError(f"{found}, greyscale; save {save} in their place.")
    if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        hint = f"{name}.transpose(0, 2, 3, 1)" if len(shape) == 4 and shape[1] == 3 else "bytes from 0 to 255"
        raise DataError(f"{found}; expected uint8 (N, H, W, 3), RGB: save {hint}.")
    if not images.bytes:
        raise DataError(f"{found}, which holds no pixels; save at least one image.")


def class_names(path: Path, labels: np.ndarray) -> tuple[str, ...]:
    if "classes" not in names_of(path):
        return tuple(np.unique(labels).astype(str).tolist())
    header = read_header(path, "classes")
    if header.dtype.kind != "U" or len(header.shape) != 1:
        raise DataError(f"classes of {path} are {header}; expected a name for each class, as strings of shape (K,).")
    check_memory(header.bytes + BYTES_OF_A_STRING * header.shape[0], f"reading classes of {path}")
    names = load_array(path, "classes")
    try:
        return tuple(names.tolist())
    except Exception as error:  # not every four bytes are a character
        raise DataError(f"classes of {path} are no text ({reason(error)}); save them anew.") from None


def read_header(path: Path, name: str) -> Header:
    with opened(path, name) as (header, _):
        return header


def load_array(path: Path, name: str, default: np.ndarray | None = None) -> np.ndarray:
    """Loads an array of any type and shape, but never unpickles; returns `default` where there is none."""
    if default is not None and name not in names_of(path):
        return default
    with opened(path, name) as (header, file):
        check_memory(header.bytes, f"reading {name} of {path}")
        return np.lib.format.read_array(file, allow_pickle=False)


def load_images(path: Path, split: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(load_array(path, f"{split}_images")))


@contextmanager
def opened(path: Path, name: str) -> Iterator[tuple[Header, IO[bytes]]]:
    """The header of an array, and the file with it, at its start. Raises DataError where that is missing or damaged."""
    if name not in names_of(path):
        raise DataError(f"{path} lacks {name}; it needs train_images, train_labels, test_images and test_labels.")
    try:
        with ExitStack() as stack:
            if path.is_dir():
                file = stack.enter_context(open(path / f"{name}.npy", "rb"))
                size = os.fstat(file.fileno()).st_size
            else:
                archive = stack.enter_context(zipfile.ZipFile(path))
                file = stack.enter_context(archive.open(f"{name}.npy"))
                size = archive.getinfo(f"{name}.npy").file_size
            header = header_of(file, size)
            file.seek(0)
            yield header, file
    except DataError:
        raise
    except Exception as error:  # on hostile bytes, numpy and zlib raise nearly anything
        found = f"{name} of {path} cannot be read ({reason(error)})"
        raise DataError(f"{found}; save it anew, as a plain array without objects.") from None


def names_of(path: Path) -> set[str]:
    """The names of the arrays in a folder or a .npz file."""
    if path.is_dir():
        return {file.stem for file in path.glob("*.npy") if file.is_file()}
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception:  # on hostile bytes, zipfile raises nearly anything
        raise DataError(f"{path} is no .npz file, or a damaged one; write it anew with numpy.savez.") from None


def header_of(file: IO[bytes], size: int) -> Header:
    """Raises ValueError where the header is too long, or speaks of other than the `size` bytes of the file."""
    start = io.BytesIO(file.read(LONGEST_HEADER))
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[np.lib.format.read_magic(start)[0]](start)
    header = Header(dtype, shape)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    if min(shape, default=0) < 0 or start.tell() + header.bytes != size:
        raise ValueError(f"its header says {header}, and it has {size} bytes")
    return header


def rounded_statistics(images: Tensor, path: Path) -> tuple[Three, Three]:
    """Mean and standard deviation by channel of uint8 (N, H, W, 3), as fractions of 255, to four digits.

    Raises DataError where a channel is constant, so that it cannot be normalised.
    """
    mean, std = (three(round(value, 4) for value in values) for values in channel_statistics(images))
    if not all(std):
        raise DataError(f"the train images of {path} do not vary in every channel; give pictures in colour.")
    return mean, std
