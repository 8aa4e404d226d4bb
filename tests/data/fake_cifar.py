"""A tiny data set of CIFAR's form, unpacked or in an archive."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastcifar.data.cifar import CIFAR10, CifarFormat

UNREACHABLE = "http://127.0.0.1:9/"


@dataclass
class Tiny:
    """A data set of CIFAR-10's form with two train batches of 20 images, a test batch of 10, and three classes."""

    form: CifarFormat
    files: dict[str, bytes]
    images: np.ndarray
    """The train split, uint8 (40, 32, 32, 3)."""
    labels: list[int]

    def folder(self, place: Path) -> Path:
        folder = place / self.form.folder
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder

    def archive(self, place: Path) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        (place / self.form.archive).write_bytes(self.packed())
        return place / self.form.archive

    def packed(self) -> bytes:
        return pack({f"{self.form.folder}/{name}": content for name, content in self.files.items()})


def pack(members: dict[str, bytes]) -> bytes:
    """Packs a .tar.gz of files by name."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return gzip.compress(plain.getvalue(), mtime=0)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def form_of(files: dict[str, bytes]) -> CifarFormat:
    """Returns CIFAR-10's form with the md5s of these files: batches.meta, data_batch_1, data_batch_2, test_batch."""
    train, test, meta = (
        {name: md5(content) for name, content in files.items() if name.startswith(start)}
        for start in ("data_batch", "test_batch", "batches.meta")
    )
    return replace(CIFAR10, train=train, test=test, meta=meta, address=UNREACHABLE)


def statistics(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of each channel, as fractions of 255, from exact counts of the 256 levels."""
    means, deviations = [], []
    for channel in images.unbind(3):
        values = np.repeat(np.arange(256) / 255, torch.bincount(channel.flatten(), minlength=256))
        means.append(values.mean())
        deviations.append(values.std())
    return means, deviations
