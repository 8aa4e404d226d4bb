"""Data sets from pictures in ``train/CLASS/*`` and ``test/CLASS/*``, decoded once and cached."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from fastcifar.data import SPLITS
from fastcifar.data.arrays import read_arrays
from fastcifar.data.cache import cache_folder
from fastcifar.data.image_set import ImageSet, check_classes
from fastcifar.data.memory import Room, check_memory
from fastcifar.errors import DataError, reason
from fastcifar.output import complain

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""The formats that Pillow may open; some of its other decoders run external programs."""

Pictures = dict[str, list[Path]]
"""The files of each class; classes and files in ascending order of their names."""

DECODING = Room()
BYTES_A_PIXEL = 20
"""What decoding a WebP takes; the other formats take 12: the picture as it was stored, upright, and in RGB."""

VERSION = 1
"""The version of the decoding; a new number invalidates older caches."""


def read_image_folder(folder: Path, split: str, size: int) -> ImageSet:
    """Reads the pictures of `folder`, each cut to its largest centred square and resized to `size` pixels a side.

    Both splits are decoded at once and kept in the user's cache, as a .npz file such as `read_arrays` reads. A picture
    that is added, removed or changed leads to another cache file. Classes and files are in ascending order of their
    names.

    Args:
        folder: holds ``train/CLASS/*`` and ``test/CLASS/*``, PNG, JPEG, WebP or BMP; hidden and other files are passed
            over.
        split: "train" or "test".
        size: side of the images, in pixels.

    Returns:
        images uint8 (N, size, size, 3), RGB; labels int64 (N,); mean and std of the train split.

    Raises:
        DataError: a picture cannot be decoded, a class is empty or its name cannot be printed, the splits' classes
        differ, the images do not fit into the memory, or the cache cannot be written.
    """
    pictures = {part: list_pictures(folder / part) for part in SPLITS}
    check_classes(sorted({name for classes in pictures.values() for name in classes}))
    for part, other in (SPLITS, SPLITS[::-1]):
        for name in sorted(pictures[part].keys() - pictures[other].keys()):
            found = f"{folder / part / name} is a class that {folder / other} lacks"
            raise DataError(f"{found}; give both splits the same classes.")
    cache = cache_folder() / f"{folder.resolve().name}-{size}-{digest(folder, pictures, size)}.npz"
    with suppress(DataError):  # not there, or damaged: then it is made anew
        return read_arrays(cache, split)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.parent / ".decoding.lock"):
            with suppress(DataError):  # another process may have made it meanwhile
                return read_arrays(cache, split)
            complain(f"decoding {folder} at {size}x{size} pixels into {cache}")
            write_arrays(cache, decode_all(pictures, size))
    except OSError as error:
        remedy = "make room there, or set XDG_CACHE_HOME to another folder"
        raise DataError(f"{cache} cannot be written ({reason(error)}); {remedy}.") from None
    return read_arrays(cache, split)


def list_pictures(folder: Path) -> Pictures:
    """The pictures in each folder of `folder`. Raises DataError where one has none."""
    try:
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        pictures = {name: sorted(path for path in (folder / name).iterdir() if is_picture(path)) for name in classes}
    except OSError as error:
        found = f"{error.filename} cannot be read ({error.strerror})"
        raise DataError(f"{found}; expected {folder.name}/CLASS/*.png.") from None
    if not pictures:
        raise DataError(
            f"{folder} holds no classes; expected a folder of pictures for each, {folder.name}/CLASS/*.png."
        )
    for name, files in pictures.items():
        if not files:
            remedy = f"put some there ({', '.join(SUFFIXES)}), or remove it from both splits"
            raise DataError(f"{folder / name} holds no pictures; {remedy}.")
    return pictures


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def digest(folder: Path, pictures: dict[str, Pictures], size: int) -> str:
    """A hash of the image size and of the name, length and time of every picture."""
    lines = [f"{VERSION} {size}"]
    for path in (path for split in pictures.values() for files in split.values() for path in files):
        try:
            state = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({reason(error)}); replace it or remove it.") from None
        if not stat.S_ISREG(state.st_mode):
            raise DataError(f"{path} is no file; replace it or remove it.")
        lines.append(f"{path.relative_to(folder).as_posix()} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def decode_all(pictures: dict[str, Pictures], size: int) -> dict[str, np.ndarray]:
    """Decodes all pictures into the arrays that `read_arrays` expects."""
    from PIL import Image

    counts = {split: sum(map(len, classes.values())) for split, classes in pictures.items()}
    check_memory(
        sum(counts.values()) * size * size * 3, f"decoding {sum(counts.values()):,} pictures at {size}x{size} pixels"
    )
    arrays = {"classes": np.array(list(pictures["train"]))}
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for split, classes in pictures.items():
            paths = [path for files in classes.values() for path in files]
            arrays[f"{split}_images"] = np.empty((counts[split], size, size, 3), np.uint8)
            for row, image in enumerate(pool.map(lambda path: decode(path, size), paths)):
                arrays[f"{split}_images"][row] = image
            arrays[f"{split}_labels"] = np.repeat(np.arange(len(classes)), [len(files) for files in classes.values()])
    return arrays


def decode(path: Path, size: int) -> np.ndarray:
    """Decodes the picture at `path` as `fit` returns it. Raises DataError where it is none."""
    with read_picture(path) as picture:
        return fit(picture, size)


def fit(picture: Picture, size: int) -> np.ndarray:
    """Crops an RGB picture to its largest centred square and resizes that if needed: uint8 (size, size, 3)."""
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS))


def upright(picture: Picture) -> Picture:
    """Converts `picture` to RGB, the right way up. Raises ValueError where that would lose bits."""
    from PIL import ImageOps

    if picture.mode.startswith(("I", "F")):
        raise ValueError("more than 8 bits a channel")
    return ImageOps.exif_transpose(picture).convert("RGB")


@contextmanager
def read_picture(path: Path) -> Iterator[Picture]:
    """The picture at `path` in RGB, the right way up. Raises DataError where it is none, or too large for the memory.

    Threads wait for each other where their pictures together would not fit.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with (
            Image.open(path, formats=FORMATS) as picture,
            DECODING.taking(BYTES_A_PIXEL * picture.width * picture.height, f"decoding {path}"),
        ):
            yield upright(picture)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path} is no {', '.join(FORMATS)} picture; replace it or remove it.") from None
    except Exception as error:  # on hostile bytes, Pillow raises nearly anything
        raise DataError(f"{path} cannot be decoded ({reason(error)}); replace it or remove it.") from None


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a .npz file atomically, and removes what a process that was killed has left of such files."""
    for partial in path.parent.glob(".*.npz.partial"):
        partial.unlink()
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("xb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType], as an array may be called allow_pickle
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
