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
    """uint8 (40, 32, 32, 3): the train split."""
    labels: list[int]

    def folder(self, place: Path) -> Path:
        """The unpacked folder, made in `place`."""
        folder = place / self.form.folder
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder

    def archive(self, place: Path) -> Path:
        """The archive, made in `place`."""
        place.mkdir(parents=True, exist_ok=True)
        (place / self.form.archive).write_bytes(self.packed())
        return place / self.form.archive

    def packed(self) -> bytes:
        return pack({f"{self.form.folder}/{name}": content for name, content in self.files.items()})


def pack(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """A .tar.gz of files by name, or of ready-made headers without contents."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                header = tarfile.TarInfo(name)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    return gzip.compress(plain.getvalue(), mtime=0)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def form_of(files: dict[str, bytes]) -> CifarFormat:
    """CIFAR-10's form with the md5s of these files: batches.meta, data_batch_1, data_batch_2, test_batch."""
    batch = {name: BatchFile(name, md5(content)) for name, content in files.items()}
    train = (batch["data_batch_1"], batch["data_batch_2"])
    return replace(CIFAR10, train=train, test=(batch["test_batch"],), meta=batch["batches.meta"], address=UNREACHABLE)


def statistics(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, as fractions of 255, from exact counts of the 256 levels."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = [
        torch.bincount(images[..., channel].flatten(), minlength=256).double() / images[..., channel].numel()
        for channel in range(3)
    ]
    means = [(share * levels).sum() for share in shares]
    deviations = [(share * (levels - mean) ** 2).sum().sqrt() for share, mean in zip(shares, means, strict=True)]
    return [mean.item() for mean in means], [deviation.item() for deviation in deviations]
