"""CIFAR-10 and CIFAR-100 as their authors publish them: pickled batches, in a folder or still in the archive.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.image_set import ImageSet
from fastcifar.data.unpickle import unpickle
from fastcifar.errors import DataError, unknown

LARGEST_ARCHIVE = 512 * 2**20
"""Bytes, unpacked: both data sets have less than 180 MiB, and a hostile archive may claim any size."""


@dataclass(frozen=True)
class BatchFile:
    """One pickled file of the data set."""

    name: str
    md5: str


@dataclass(frozen=True)
class CifarFormat:
    """Where a data set of CIFAR's form is found, and how it is laid out."""

    archive: str
    """Name of the .tar.gz."""
    address: str
    """Where its authors publish the archive."""
    archive_md5: str
    folder: str
    """Folder within the archive that holds the batches."""
    train: tuple[BatchFile, ...]
    test: tuple[BatchFile, ...]
    meta: BatchFile
    """The file with the class names."""
    label_key: bytes
    """Key of the labels in each batch."""
    classes_key: bytes
    """Key of the class names in `meta`."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def files(self, split: str) -> tuple[BatchFile, ...]:
        """The batches of "train" or "test"; any other name raises DataError."""
        batches = {"train": self.train, "test": self.test}
        if split not in batches:
            raise DataError(unknown("split", split, batches))
        return batches[split]


CIFAR10 = CifarFormat(
    archive="cifar-10-python.tar.gz",
    address="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    archive_md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    train=(
        BatchFile("data_batch_1", "c99cafc152244af753f735de768cd75f"),
        BatchFile("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
        BatchFile("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
        BatchFile("data_batch_4", "634d18415352ddfa80567beed471001a"),
        BatchFile("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
    ),
    test=(BatchFile("test_batch", "40351d587109b95175f43aff81a1287e"),),
    meta=BatchFile("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
    label_key=b"labels",
    classes_key=b"label_names",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

CIFAR100 = CifarFormat(
    archive="cifar-100-python.tar.gz",
    address="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    train=(BatchFile("train", "16019d7e3df5f24257cddd939b257f8d"),),
    test=(BatchFile("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
    meta=BatchFile("meta", "7973b15100ade9c7d40fb424638fde48"),
    label_key=b"fine_labels",
    classes_key=b"fine_label_names",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def read_cifar(form: CifarFormat, place: Path, split: str) -> ImageSet:
    """The images of one split, from the folder of batches or the .tar.gz at `place`; nothing is written to disk.

    Every file is checked against its md5 before it is interpreted.

    Args:
        form: the layout of the data set.
        place: the folder that holds the batches themselves, or the archive.
        split: "train" or "test".

    Returns:
        images uint8 (N, 32, 32, 3), contiguous; labels int64 (N,).

    Raises:
        DataError: a file is missing, damaged or not what it should be; the sentence names it.
    """
    wanted = (form.meta, *form.files(split))
    contents = _read_folder(place, wanted) if place.is_dir() else _read_archive(place, form.folder, wanted)
    classes = _class_names(contents[form.meta.name], form, place)
    batches = [_batch(contents.pop(file.name), form, file, place, len(classes)) for file in form.files(split)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return ImageSet(images, labels, classes, form.mean, form.std)


def _read_folder(folder: Path, wanted: tuple[BatchFile, ...]) -> dict[str, bytes]:
    contents = {}
    for file in wanted:
        try:
            content = (folder / file.name).read_bytes()
        except OSError as error:
            raise DataError(
                f"{folder / file.name} cannot be read ({error.strerror}); delete {folder} and run again."
            ) from None
        contents[file.name] = _checked(content, file, folder)
    return contents


def _read_archive(archive: Path, folder: str, wanted: tuple[BatchFile, ...]) -> dict[str, bytes]:
    """The wanted members of `folder`, read in one pass that ends with the last of them; all other members are passed
    over.
    """
    missing = {f"{folder}/{file.name}": file for file in wanted}
    contents = {}
    try:
        with gzip.open(archive) as unpacked, tarfile.open(fileobj=_Bounded(unpacked, archive), mode="r|") as members:
            while missing and (member := members.next()):
                if file := missing.pop(member.name, None):
                    contents[file.name] = _checked(_read_member(members, member, archive), file, archive)
    except DataError:
        raise
    except Exception as error:  # on hostile bytes, tarfile and zlib raise nearly anything
        raise DataError(f"{archive} is damaged or no archive ({error}); delete it and run again.") from None
    if missing:
        raise DataError(f"{archive} lacks {' and '.join(missing)}; delete it and run again.")
    return contents


def _read_member(members: tarfile.TarFile, member: tarfile.TarInfo, archive: Path) -> bytes:
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise DataError(
            f"{archive} holds {member.name} as something other than a plain file; delete {archive} and run again."
        )
    if member.size > LARGEST_ARCHIVE:
        raise _too_large(archive)
    return members.extractfile(member).read()


class _Bounded:
    """A stream that ends in an error rather than unpack without end; tarfile keeps whole headers in memory, as large
    as they claim.
    """

    def __init__(self, stream: BinaryIO, archive: Path) -> None:
        self.stream, self.archive, self.left = stream, archive, LARGEST_ARCHIVE

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise _too_large(self.archive)
        return self.stream.read(size)


def _too_large(archive: Path) -> DataError:
    return DataError(
        f"{archive} unpacks to more than {LARGEST_ARCHIVE // 2**20} MiB, so it is not CIFAR; delete it and run again."
    )


def _checked(content: bytes, file: BatchFile, place: Path) -> bytes:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != file.md5:
        raise DataError(
            f"{place / file.name} is damaged: its md5 is {found}, expected {file.md5}; delete {place} and run again."
        )
    return content


def _batch(content: bytes, form: CifarFormat, file: BatchFile, place: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 32, 32, 3) and labels int64 (N,) of one file, whose rows are planes: red, green, blue, each
    32 by 32.
    """
    path = place / file.name
    match unpickle(content, str(path)):
        case {b"data": np.ndarray(dtype=np.uint8, ndim=2) as data, form.label_key: list(labels)} if (
            data.shape[1] == 3072
        ):
            pass
        case _:
            raise DataError(
                f"{path} has not the form of CIFAR: expected uint8 data of (N, 3072) and labels; delete {place} and "
                "run again."
            )
    if len(labels) != len(data) or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise DataError(
            f"{path} lacks one label from 0 to {classes - 1} for each of {len(data)} images; delete {place} and run "
            "again."
        )
    images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return torch.from_numpy(images), torch.tensor(labels)


def _class_names(content: bytes, form: CifarFormat, place: Path) -> tuple[str, ...]:
    path = place / form.meta.name
    match unpickle(content, str(path)):
        case {form.classes_key: list(names)} if names and all(type(name) is bytes for name in names):
            return tuple(name.decode("latin-1") for name in names)
    raise DataError(f"{path} does not list the class names; delete {place} and run again.")
