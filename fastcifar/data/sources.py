"""Finds and fetches data sets by name or path. Torch is imported only when one is loaded."""

from __future__ import annotations

import math
import os
import re
import shlex
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from fastcifar.data import IMAGE_SIZES, SPLITS
from fastcifar.data.cache import cache_folder
from fastcifar.errors import DataError, unknown
from fastcifar.models import GIVEN
from fastcifar.output import complain

if TYPE_CHECKING:
    from fastcifar.data.cifar import CifarFormat
    from fastcifar.data.image_set import ImageSet

CIFAR_FORMATS = {
    "cifar10": "fastcifar.data.cifar:CIFAR10",
    "cifar100": "fastcifar.data.cifar:CIFAR100",
}
"""The data sets that are read from files, with the module attribute that describes each."""

DATASETS = (*CIFAR_FORMATS, "synthetic")
"""All names of data sets; the synthetic one is drawn when asked for."""

IMAGE_SIZE = 32
"""Pixels a side of the pictures in an image folder, unless its path gives a size."""

QUICK_DOWNLOAD = 60.0
"""Seconds that a first run waits for CIFAR-10."""


def load_dataset(
    name: str,
    split: str = "train",
    data_dir: str | Path | None = None,
    download: bool = True,
) -> ImageSet:
    """Loads the data set `name` into memory.

    A path leads to the user's own: a .npz file, or a folder of .npy files, as `arrays.read_arrays` has them; or an
    image folder with ``train/CLASS/*`` and ``test/CLASS/*``, resized to 32 pixels a side, or to SIZE if the path is
    followed by ``@SIZE``.

    CIFAR is looked for in `data_dir`, then ``$FASTCIFAR_DATA``, then the user's cache; each may hold the unpacked
    folder or the .tar.gz as its authors publish them, or be that folder itself. Every file is checked against its md5
    at every read. What is nowhere is fetched into the cache, since a stranger's file may name any `data_dir`: from
    the authors, and then from ``$FASTCIFAR_MIRRORS``, addresses of folders or archives, separated by spaces or commas.

    Args:
        name: "cifar10", "cifar100" or "synthetic"; or a path, for which `data_dir` and what follows it have no meaning.
        split: "train" or "test".
        data_dir: the folder to look in first, which has to exist.
        download: whether to fetch what is not at hand.

    Returns:
        images uint8 (N, 32, 32, 3), RGB; labels int64 (N,); class names, and mean and std of the train split.
        N is 50,000 and 10,000 for CIFAR, 10,000 and 2,000 for "synthetic"; sizes other than 32 are possible for paths
        alone.

    Raises:
        DataError: an unknown name or split, or files that are missing, damaged or out of reach.
    """
    if split not in SPLITS:
        raise DataError(unknown("split", split, SPLITS))
    if name == "synthetic":
        from fastcifar.data.synthetic import synthetic

        return synthetic(split)
    if name == GIVEN:
        raise DataError(
            "the images were given in Python and are on no disk; give them again there, as train_set= and test_set=."
        )
    if is_path(name):
        return read_path(name, split)
    from fastcifar.data.cifar import read_cifar

    form = cifar_form(name)
    place = find(name, data_dir)
    if place is None:
        if not download:
            raise DataError(f"{absence(form, data_dir)}; put what is missing there, or use --dataset synthetic.")
        check_data_dir(data_dir)
        place = fetch(form, absence(form, data_dir))
    return read_cifar(form, place, split)


def find(name: str, data_dir: str | Path | None = None) -> Path | None:
    """The file or folder that `load_dataset` would read; None where it is absent or the set is drawn.

    Raises:
        DataError: an unknown name, or ``$FASTCIFAR_DATA`` is set but names no folder.
    """
    if name in ("synthetic", GIVEN):
        return None
    if is_path(name):
        path, _ = path_and_size(name)
        return path if os.path.exists(path) else None
    form = cifar_form(name)
    for folder in search_folders(data_dir):
        for batches in (folder / form.folder, folder):
            if not lacking(batches, form):
                return batches
        if os.path.isfile(folder / form.archive):
            return folder / form.archive
    return None


def is_known(name: str) -> bool:
    """Whether `name` is in `DATASETS` or is a path, which need not exist."""
    return name in (*DATASETS, GIVEN) or is_path(name)


def is_path(name: str) -> bool:
    """Whether `name` is a path. The names in `DATASETS` are not: write ./cifar10 for a folder called cifar10."""
    looks_so = "/" in name or os.sep in name or "@" in name or name.endswith(".npz")
    return name not in (*DATASETS, GIVEN) and (looks_so or os.path.exists(name))


def unknown_dataset(name: str) -> str:
    """An error sentence on an unknown data set, with the nearest names."""
    sentence = unknown("dataset", name, DATASETS)
    return f"{sentence[:-1]}, or a path such as ./set.npz or ./pictures@32{sentence[-1]}"


def resolve_auto(data_dir: str | Path | None = None) -> tuple[str, str]:
    """The data set of a first run, and the reason in one line.

    It is CIFAR-10 if that is present or arrives within a minute, else the synthetic set.

    Raises:
        DataError: `data_dir` or ``$FASTCIFAR_DATA`` is set but names no folder.
    """
    check_data_dir(data_dir)
    if place := find("cifar10", data_dir):
        return "cifar10", f"CIFAR-10, found at {place}"
    try:
        form = cifar_form("cifar10")
        place = fetch(form, absence(form, data_dir), QUICK_DOWNLOAD)
    except DataError as error:
        reason = str(error).split("; ")[0]  # what follows is advice to take the drawn set
        return "synthetic", f"drawn shapes in place of CIFAR-10: {reason}"
    return "cifar10", f"CIFAR-10, fetched to {place}"


def check_data_dir(data_dir: str | Path | None) -> None:
    """Raises DataError where `data_dir` is no folder, so that a misspelt one is noticed."""
    if data_dir is not None and not os.path.isdir(folder := expanded(data_dir)):
        raise DataError(
            f"data_dir {data_dir} is no folder; correct it, or make one with: mkdir -p {shlex.quote(str(folder))}"
        )


def search_folders(data_dir: str | Path | None = None) -> list[Path]:
    """The folders to look for data sets in, in order.

    Raises:
        DataError: ``$FASTCIFAR_DATA`` is set but names no folder.
    """
    folders = [expanded(data_dir)] if data_dir is not None else []
    if named := os.environ.get("FASTCIFAR_DATA"):
        if not os.path.isdir(expanded(named)):
            raise DataError(f"FASTCIFAR_DATA names {named}, which is no folder; make it, correct it, or unset it.")
        folders.append(expanded(named))
    return [*folders, cache_folder()]


def expanded(path: str | Path) -> Path:
    """The path with ~ replaced; one of an unknown user stays, and leads nowhere."""
    return Path(os.path.expanduser(path))


def cifar_form(name: str) -> CifarFormat:
    if name not in CIFAR_FORMATS:
        raise DataError(unknown_dataset(name))
    return resolve_name(CIFAR_FORMATS[name])


def read_path(name: str, split: str) -> ImageSet:
    path, size = path_and_size(name)
    if os.path.isfile(path) or os.path.exists(path / "train_images.npy"):
        if size is not None:
            raise DataError(f"{path} holds arrays, and @{size} resizes pictures; leave it out.")
        from fastcifar.data.arrays import read_arrays

        return read_arrays(path, split)
    if os.path.isdir(path / "train"):
        from fastcifar.data.image_folder import read_image_folder

        return read_image_folder(path, split, IMAGE_SIZE if size is None else size)
    found = "holds neither train_images.npy nor train/CLASS/*.png" if os.path.exists(path) else "does not exist"
    raise DataError(
        f"{path} {found}; give a .npz file, a folder of .npy files, or one of pictures in train/CLASS and test/CLASS."
    )


def path_and_size(name: str) -> tuple[Path, int | None]:
    """Splits PATH@SIZE into path and size; a path that exists is taken whole, without a size."""
    plain = expanded(name)
    before, at, size = name.rpartition("@")
    if not at or "/" in size or os.sep in size or os.path.exists(plain):
        return plain, None
    if not re.fullmatch("[0-9]{1,4}", size) or int(size) not in IMAGE_SIZES:
        raise DataError(
            f"{name} has no size after its @; give {IMAGE_SIZES.start} to {IMAGE_SIZES.stop - 1} pixels, as in "
            f"{before}@32."
        )
    return expanded(before), int(size)


def lacking(folder: Path, form: CifarFormat) -> list[str]:
    """The files of the data set that are not in `folder`."""
    return [name for name in form.files() if not os.path.isfile(folder / name)]


def absence(form: CifarFormat, data_dir: str | Path | None) -> str:
    folders = search_folders(data_dir)
    for folder in (batches for parent in folders for batches in (parent / form.folder, parent)):
        if folder.name == form.folder and os.path.isdir(folder):
            return f"{folder} lacks {', '.join(lacking(folder, form))}"
    return f"no {form.folder} or {form.archive} in {' or '.join(map(str, folders))}"


def fetch(form: CifarFormat, why: str, deadline_seconds: float = math.inf) -> Path:
    """Fetches the archive into the cache, and says `why`."""
    from fastcifar.data.download import download

    archive = cache_folder() / form.archive
    complain(f"{why}; fetching {archive}")
    download(addresses(form), archive, form.archive_md5, form.archive_size, deadline_seconds)
    return archive


def addresses(form: CifarFormat) -> list[str]:
    given = (form.address, *os.environ.get("FASTCIFAR_MIRRORS", "").replace(",", " ").split())
    return [base if base.endswith(".tar.gz") else f"{base.rstrip('/')}/{form.archive}" for base in given]
