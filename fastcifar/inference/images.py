"""Images that people want classified: arrays, pictures or a CIFAR batch, read a stretch at a time where the form allows it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.arrays import load_array
from fastcifar.data.image_folder import SUFFIXES, decode, is_picture
from fastcifar.data.unpickle import unpickle
from fastcifar.errors import DataError

FORMS = "give a .npy or .npz file, a folder of pictures, or a pickled CIFAR batch"


@dataclass(frozen=True)
class Images:
    """Images in their order."""

    count: int
    read: Callable[[int, int], np.ndarray]
    """From a start and a stop to uint8 (stop - start, H, W, 3)."""

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 (n, H, W, 3), n at most `size`."""
        for start in range(0, self.count, size):
            yield torch.from_numpy(np.array(self.read(start, min(start + size, self.count)), order="C"))


def open_images(path: Path, image_size: int) -> Images:
    """The images at `path`, for a network that takes `image_size` pixels a side.

    Args:
        path: a .npy file; a .npz file with `images`, or with one array alone; a folder of pictures, flat or with folders in it, in order
            of their paths, each cut to its largest centred square and resized, as in training; or a pickled CIFAR batch, labelled or not.
        image_size: pixels a side; arrays must have it, pictures get it.

    Raises:
        DataError: nothing there, damaged, empty, or of another type or shape; the sentence names it.
    """
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist; {FORMS}.")
    if os.path.isdir(path):
        return open_pictures(path, image_size)
    if path.suffix == ".npy":
        array, name = map_array(path), str(path)
    elif path.suffix == ".npz":
        key = images_key(path)
        array, name = load_array(path, key), f"{key} of {path}"
    else:
        array, name = read_batch(path), str(path)
    check_images(array, name, image_size)
    return Images(len(array), lambda start, stop: array[start:stop])


def check_images(array: np.ndarray, name: str, image_size: int) -> None:
    """Raises DataError where `array`, which `name` stands for, is not uint8 (N, image_size, image_size, 3), with N at least 1."""
    found, expected = f"{name}: images are {array.dtype} {array.shape}", f"uint8 (N, {image_size}, {image_size}, 3), RGB"
    if array.dtype == np.uint8 and array.ndim == 4 and array.shape[1:] == (3, image_size, image_size):
        raise DataError(f"{found}; expected {expected}: save images.transpose(0, 2, 3, 1).")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (image_size, image_size, 3):
        raise DataError(f"{found}; expected {expected}, as the run was trained on.")
    if not len(array):
        raise DataError(f"{name} holds no images; save at least one.")


def map_array(path: Path) -> np.ndarray:
    """The array in a .npy file, left on disk until it is read. Raises DataError where it is damaged or pickled."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # on hostile bytes, numpy raises nearly anything
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}); save it anew, as a plain array without objects.") from None


def images_key(path: Path) -> str:
    """The name of the images in a .npz file: "images", or that of its only array. Raises DataError where there is neither."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
    except Exception:  # on hostile bytes, numpy and zlib raise nearly anything
        raise DataError(f"{path} is no .npz file, or a damaged one; write it anew with numpy.savez.") from None
    if "images" in names:
        return "images"
    if len(names) != 1:
        raise DataError(f"{path} holds {', '.join(sorted(names)) or 'nothing'}; name the array to classify images.")
    return names[0]


def read_batch(path: Path) -> np.ndarray:
    """The images of a pickled CIFAR batch, uint8 (N, 32, 32, 3); the pickle is interpreted, never executed. Raises DataError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {FORMS}.") from None
    match unpickle(content, str(path)):
        case {b"data": np.ndarray(dtype=np.uint8, ndim=2) as data} | {"data": np.ndarray(dtype=np.uint8, ndim=2) as data} if (
            data.shape[1] == 3072
        ):
            return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    raise DataError(f"{path} is no CIFAR batch: expected a dict with uint8 data of (N, 3072); {FORMS}.")


def open_pictures(folder: Path, size: int) -> Images:
    """The pictures anywhere below `folder`, hidden ones left out, in the order of their paths; decoded when they are read."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if is_picture(path) and path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise DataError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}); {FORMS}.")

    def read(start: int, stop: int) -> np.ndarray:
        from PIL import Image

        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return np.stack(list(pool.map(lambda path: decode(path, size), paths[start:stop])))

    return Images(len(paths), read)


def read_pair(text: str, image_size: int, classes: int) -> tuple[Tensor, Tensor]:
    """A labelled set: images uint8 (N, image_size, image_size, 3) and labels int64 (N,), each below `classes`.

    Args:
        text: a .npz file with `images` and `labels`, a folder with images.npy and labels.npy, or the two files as IMAGES.npy,LABELS.npy.
        image_size: pixels a side.
        classes: how many there are.

    Raises:
        DataError: an array is missing, damaged, or has another type, shape or range; the sentence names it.
    """
    absent = np.empty(0)
    parts = [Path(part).expanduser() for part in text.split(",")] if text.endswith(".npy") else [Path(text).expanduser()]
    for part in parts:
        if not os.path.exists(part):
            raise DataError(f"{part} does not exist; give a .npz file with images and labels, or IMAGES.npy,LABELS.npy.")
    if len(parts) == 2:
        images, labels = (map_array(part) for part in parts)
    else:
        images, labels = (load_array(parts[0], name, absent) for name in ("images", "labels")) if len(parts) == 1 else (absent, absent)
    if images is absent or labels is absent:
        raise DataError(f"{text} is no pair of images and labels; give a .npz file with both, or IMAGES.npy,LABELS.npy.")
    check_images(images, text, image_size)
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(f"{text}: labels are {labels.dtype} {labels.shape}; expected integers ({len(images)},), one for each image.")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(f"{text}: labels run from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}, the classes of the run.")
    return torch.from_numpy(np.array(images)), torch.from_numpy(labels.astype(np.int64))
