"""CIFAR-10 and CIFAR-100 as their authors publish them: pickled batches, in a folder or still in the archive.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastcifar.checks import given
from fastcifar.data.image_set import ImageSet, Three
from fastcifar.data.unpickle import unpickle
from fastcifar.errors import DataError, reason

LARGEST_FILE = 2**28
"""Most bytes to read of a file: none of the authors' has as many."""


@dataclass(frozen=True)
class CifarFormat:
    """The files and the layout of a data set in CIFAR's format."""

    archive: str
    archive_md5: str
    archive_size: int
    """Size of the archive in bytes."""
    folder: str
    """Folder within the archive that holds the batches."""
    train: dict[str, str]
    """The md5 of each batch, by file name."""
    test: dict[str, str]
    meta: dict[str, str]
    label_key: bytes
    classes_key: bytes
    """Key of the class names in `meta`."""
    mean: Three
    std: Three
    address: str = "https://www.cs.toronto.edu/~kriz/"
    """The URL of the folder with the archive."""

    def files(self) -> dict[str, str]:
        return self.meta | self.train | self.test

    def batches(self, split: str) -> dict[str, str]:
        return self.train if split == "train" else self.test


CIFAR10 = CifarFormat(
    archive="cifar-10-python.tar.gz",
    archive_md5="c58f30108f718f92721af3b95e74349a",
    archive_size=170_498_071,
    folder="cifar-10-batches-py",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
    label_key=b"labels",
    classes_key=b"label_names",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

CIFAR100 = CifarFormat(
    archive="cifar-100-python.tar.gz",
    archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
    archive_size=169_001_437,
    folder="cifar-100-python",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
    label_key=b"fine_labels",
    classes_key=b"fine_label_names",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def read_cifar(form: CifarFormat, place: Path, split: str) -> ImageSet:
    """Reads the images of one split from the folder or .tar.gz at `place`, without writing to disk.

    Every file, or the archive as a whole, is checked against its md5 before it is interpreted.

    Returns:
        images uint8 (N, 32, 32, 3), contiguous; labels int64 (N,).

    Raises:
        DataError: a file is missing or damaged; the sentence names it.
    """
    wanted = form.meta | form.batches(split)
    if place.is_dir():
        contents = {name: read_checked(place / name, md5, place) for name, md5 in wanted.items()}
    else:
        contents = unpack(read_checked(place, form.archive_md5, place), form.folder, wanted)
    meta, *batches = (unpickle(contents.pop(name), str(place / name)) for name in wanted)
    labels = torch.tensor([label for batch in batches for label in batch[form.label_key]])
    planes = [batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for batch in batches]
    images = np.concatenate(planes, out=np.empty((len(labels), 32, 32, 3), np.uint8))
    classes = tuple(name.decode() for name in meta[form.classes_key])
    return ImageSet(torch.from_numpy(images), labels, classes, form.mean, form.std)


def read_checked(path: Path, md5: str, place: Path) -> bytes:
    """Reads the file at `path`, of whatever size. Raises DataError where its md5 is another."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); delete {place} and run again.") from None
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        problem = f"{path} is damaged: its md5 is {found}, expected {md5}"
        raise DataError(f"{problem}; delete {place} and run again.")
    return content


def unpack(archive: bytes, folder: str, wanted: Iterable[str]) -> dict[str, bytes]:
    """Unpacks the wanted members of `folder` in one pass, which ends with the last of them."""
    missing, contents = {f"{folder}/{name}": name for name in wanted}, {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r|gz") as members:
        while missing:
            member = given(members.next())
            if name := missing.pop(member.name, None):
                contents[name] = given(members.extractfile(member)).read()
    return contents
