"""Images to classify: arrays, pictures or a CIFAR batch, read in pieces where the form allows it."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcifar.data.arrays import load_array, names_of
from fastcifar.data.image_folder import SUFFIXES, fit, is_picture, read_picture, upright
from fastcifar.data.unpickle import unpickle
from fastcifar.errors import DataError, reason

FORMS = "give a picture, a folder of pictures, a .npy or .npz file, or a pickled CIFAR batch"
PAIRS = "give a .npz file with images and labels, or IMAGES.npy,LABELS.npy"
"""The accepted forms, for the end of an error's sentence."""

Source = str | Path | np.ndarray | Tensor | Image.Image | Sequence["Source"]
"""The types that `open_images` accepts."""

Items = np.ndarray | Sequence[np.ndarray | Path | Image.Image]


@dataclass(frozen=True)
class Images:
    """Images in order; those of another size are cut to their largest centred square and resized when read."""

    items: Items
    """Arrays are uint8 (H, W, 3), RGB; or one array of all images, (N, H, W, 3)."""
    size: int
    """Pixels a side, once read."""
    names: Sequence[str] | None = None
    """Names of the files, where each image has its own."""
    resized: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Number of images read so far that had another size, by width and height."""

    def __len__(self) -> int:
        return len(self.items)

    def batches(self, count: int) -> Iterator[Tensor]:
        """Yields uint8 (n, size, size, 3), n at most `count`. Raises DataError where a picture cannot be decoded."""
        for start in range(0, len(self), count):
            yield torch.from_numpy(self.read(self.items[start : start + count]))

    def read(self, items: Items) -> np.ndarray:
        if isinstance(items, np.ndarray) and items.shape[1:3] == (self.size, self.size):
            return np.array(items, order="C")
        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            arrays, sizes = zip(*pool.map(self.read_one, items), strict=True)
        self.resized.update(size for size in sizes if size != (self.size, self.size))
        return np.stack(arrays)

    def read_one(self, item: np.ndarray | Path | Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns uint8 (size, size, 3), and the original width and height."""
        if isinstance(item, Path):
            with read_picture(item) as picture:
                return fit(picture, self.size), picture.size
        picture = Image.fromarray(item) if isinstance(item, np.ndarray) else item
        return fit(picture, self.size), picture.size


def open_images(source: Source, image_size: int) -> Images:
    """Opens `source` for a network that takes `image_size` pixels a side; other sizes are resized when read.

    Args:
        source: uint8 (N, H, W, 3), RGB, as an array or a tensor; a Pillow image; the path of a .npy file, of a .npz
            file with `images` or with a single array, of a picture, of a folder of pictures, flat or nested, in the
            order of their paths, or of a pickled CIFAR batch, labelled or not; or a list of these.

    Raises:
        DataError: the source is missing, damaged, empty, or of another type or shape; the sentence names it.
    """
    if isinstance(source, list | tuple):
        items = [item for part in source for item in open_images(part, image_size).items]
        if not items:
            raise DataError("the list of images is empty; give at least one.")
        return Images(items, image_size)
    if isinstance(source, str | Path):
        return open_path(Path(source), image_size)
    if isinstance(source, Image.Image):
        try:
            return Images([upright(source)], image_size)
        except ValueError as error:
            raise DataError(f"the picture has {error}; convert it to RGB.") from None
    if not isinstance(source, np.ndarray | Tensor):
        raise DataError(
            f"images are {type(source).__name__}; give a path, a uint8 (N, H, W, 3) array, a Pillow image, or a list "
            "of these."
        )
    check_images(source, "the array")
    return Images(source.cpu().numpy() if isinstance(source, Tensor) else source, image_size)


def open_path(path: Path, image_size: int) -> Images:
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist; {FORMS}.")
    if os.path.isdir(path):
        paths = list_pictures(path)
        return Images(paths, image_size, [picture.relative_to(path).as_posix() for picture in paths])
    if path.suffix.lower() in SUFFIXES:
        return Images([path], image_size, [path.name])
    if path.suffix == ".npy":
        array, name = map_array(path), str(path)
    elif path.suffix == ".npz":
        key = images_key(path)
        array, name = load_array(path, key), f"{key} of {path}"
    else:
        array, name = read_batch(path), str(path)
    check_images(array, name)
    return Images(array, image_size)


def list_pictures(folder: Path) -> list[Path]:
    """Lists the pictures below `folder`, at any depth, by path, hidden ones left out. Raises DataError without any."""
    found = [path for path in folder.rglob("*") if is_picture(path) and path.is_file()]
    paths = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not paths:
        raise DataError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}); {FORMS}.")
    return paths


def check_images(array: np.ndarray | Tensor, name: str, size: int | None = None) -> None:
    """Raises DataError where `array`, called `name`, is not uint8 (N, H, W, 3), is empty, or is not of `size`."""
    dtype, shape = str(array.dtype).removeprefix("torch."), tuple(array.shape)
    found = f"{name}: images are {dtype} {shape}"
    expected = f"uint8 (N, {'H, W' if size is None else f'{size}, {size}'}, 3), RGB"
    whole = dtype == "uint8" and len(shape) == 4
    if whole and shape[1] == 3 != shape[3]:
        raise DataError(f"{found}; expected {expected}: save images.transpose(0, 2, 3, 1).")
    if not whole or shape[3] != 3:
        raise DataError(f"{found}; expected {expected}.")
    if size is not None and shape[1:3] != (size, size):
        raise DataError(f"{found}; expected {expected}, as the run was trained on.")
    if 0 in shape:
        raise DataError(f"{name} holds no images; save at least one.")


def map_array(path: Path) -> np.ndarray:
    """Maps the array of a .npy file, left on disk until read. Raises DataError where it is damaged or pickled."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # on hostile bytes, numpy raises nearly anything
        raise DataError(
            f"{path} cannot be read ({reason(error)}); save it anew, as a plain array without objects."
        ) from None


def images_key(path: Path) -> str:
    """Returns "images", or the name of the only array in a .npz file. Raises DataError where it has neither."""
    names = sorted(names_of(path))
    if "images" not in names and len(names) != 1:
        raise DataError(f"{path} holds {', '.join(names) or 'nothing'}; name the array to classify images.")
    return "images" if "images" in names else names[0]


def read_batch(path: Path) -> np.ndarray:
    """Reads a pickled CIFAR batch without executing it, uint8 (N, 32, 32, 3). Raises DataError where it is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {FORMS}.") from None
    batch = unpickle(content, str(path))
    data = batch.get(b"data", batch.get("data")) if isinstance(batch, dict) else None
    if isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3072,):
        return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    raise DataError(f"{path} is no CIFAR batch: expected a dict with uint8 data of (N, 3072); {FORMS}.")


def read_pair(text: str, image_size: int, classes: int) -> tuple[Tensor, Tensor]:
    """Reads a labelled set: images uint8 (N, image_size, image_size, 3) and labels int64 (N,), below `classes`.

    It is a .npz file with `images` and `labels`, a folder with images.npy and labels.npy, or the two files as
    IMAGES.npy,LABELS.npy. Raises DataError, which names the array, where one is missing or damaged, or has another
    type, shape or range.
    """
    paths = [Path(os.path.expanduser(part)) for part in (text.split(",") if text.endswith(".npy") else [text])]
    for path in paths:
        if not os.path.exists(path):
            raise DataError(f"{path} does not exist; {PAIRS}.")
    images = labels = absent = np.empty(0)
    if len(paths) == 2:
        images, labels = map(map_array, paths)
    elif len(paths) == 1:
        images, labels = (load_array(paths[0], name, absent) for name in ("images", "labels"))
    if images is absent or labels is absent:
        raise DataError(f"{text} is no pair of images and labels; {PAIRS}.")
    check_images(images, text, image_size)
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(
            f"{text}: labels are {labels.dtype} {labels.shape}; expected integers ({len(images)},), one for each image."
        )
    if not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"{text}: labels run from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}, the classes of "
            "the run."
        )
    return torch.from_numpy(np.array(images)), torch.from_numpy(labels.astype(np.int64))
