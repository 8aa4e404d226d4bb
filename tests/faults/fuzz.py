"""Mutates every file that the package reads: each is read, or refused in one sentence, in seconds and within 1 GiB."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastcifar.checks import given
from fastcifar.cli import starting_point
from fastcifar.data.arrays import read_arrays
from fastcifar.data.cifar import CIFAR10, read_cifar
from fastcifar.data.image_folder import SUFFIXES, read_image_folder
from fastcifar.inference.images import open_images
from fastcifar.many.results import Row, read_rows, write_rows
from fastcifar.runs.checkpoint import SUMS, latest
from fastcifar.runs.ensembles import read_report
from fastcifar.runs.folder import Run
from fastcifar.runs.network import read_network
from fastcifar.runs.records import read_records

from .harness import Attack, Trial, Undisturbed, fastcifar, in_child

MUTATIONS, SECONDS = 600, 5.0
"""Mutations of each file, which are drawn by their numbers, and how long the reading of one may take."""
VALUE = re.compile(rb'(?<=[:\[,])\s*("[^"\n]*"|-?[\d.]+|null|true|false)')
ODD_VALUES = [*rb'null -1 0 1e999 NaN [] {} "" "\u0000" "\u001b[2J" "../../x"'.split(), b"9" * 400, b"[" * 9999]
"""What takes the place of a value in JSON."""
ODD_BYTES = [b"", b"\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(8), b"\n", b"%s", b"\x1b[2J", b"9" * 30]


@dataclass(frozen=True)
class Subject:
    """A file that is read, in a folder that has all that belongs to it."""

    folder: Path
    file: str
    read: Callable[[Path], object]
    """Reads what is in the folder, given the path of the file."""


def mutated(content: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.randint(1, 3)):
        start, other, kind = draw.randrange(len(content) + 1), draw.randrange(len(content) + 1), draw.random()
        end = start + draw.choice((0, 1, 4, 8, 64, len(content)))
        middle = draw.choice((draw.choice(ODD_BYTES), draw.randbytes(4), content[other : other + 16]))
        if kind < 0.5 and (values := [*VALUE.finditer(content[:20_000])]):
            (start, end), middle = draw.choice(values).span(), draw.choice(ODD_VALUES)
        elif kind > 0.8 and start < len(content):
            end, middle = start + 1, bytes([content[start] ^ 1 << draw.randrange(8)])
        content = content[:start] + middle + content[end:]
    return content


def load(file: Path) -> object:
    """Loads the network of the run that a file of a checkpoint belongs to."""
    return read_network(file.parents[2]).load(torch.device("cpu"))


def load_signed(file: Path) -> object:
    """Does the same with right digests, so that damage is met by what reads the file."""
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in file.parent.glob("*.*")]
    (file.parent / SUMS).write_text("".join(sums))
    return load(file)


def made_files(place: Path) -> None:
    """Makes arrays, a CIFAR batch, an archive, pictures and results beside what the command line has made."""
    np.savez(place / "data.npz", **(arrays := dict(np.load(place / "data.npz"))))
    for name in ("npz", "npy", "cifar", "rows", "pictures/train/ant", "pictures/test/ant"):
        (place / name).mkdir(parents=True)
    shutil.copy(place / "data.npz", place / "npz")
    for name, array in arrays.items():
        np.save(place / "npy" / f"{name}.npy", array)
    (place / "cifar/batch").write_bytes(
        pickle.dumps({b"data": np.arange(4 * 3072, dtype=np.uint8).reshape(4, -1), b"labels": [0, 1, 2, 3]}, protocol=2)
    )
    with tarfile.open(place / "cifar/batch.tar.gz", "w:gz") as archive:
        archive.add(place / "cifar/batch", f"{CIFAR10.folder}/batch")
    row = Row(
        "quickstart", 1, False, 0, {"epochs": 1}, 0.5, {"swa": 0.5}, None, 1.0, 1.0, "a CPU", {"torch": "2"}, None
    )
    write_rows(place / "rows/results.json", [row])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8))
    picture.save(place / "pictures/test/ant/a.png")
    for suffix in SUFFIXES:
        picture.save(place / f"pictures/train/ant/a{suffix}")


def subjects(place: Path) -> Iterator[Subject]:
    run, other = Undisturbed.make(place).run, place / "other"
    shutil.copytree(run, other)
    ended = in_child(fastcifar("ensemble", run, other, "--out", place / "ensemble"))
    assert ended.status == 0, ended.output
    made_files(place)
    yield Subject(run, "config.json", lambda file: (starting_point({"config": file}), Run(file.parent).config()))
    yield Subject(run, "metrics.jsonl", read_records)
    yield Subject(run, "result.json", lambda file: Run(file.parent).result())
    yield Subject(place / "ensemble", "ensemble.json", lambda file: read_report(file.parent))
    yield Subject(place / "rows", "results.json", read_rows)
    for path in given(latest(run / "checkpoints")).iterdir():
        yield Subject(run, str(path.relative_to(run)), load if path.name == SUMS else load_signed)
    yield Subject(place / "npz", "data.npz", lambda file: read_arrays(file, "test"))
    for name in ("classes", "test_images", "train_labels"):
        yield Subject(place / "npy", f"{name}.npy", lambda file: read_arrays(file.parent, "test"))
    for name in ("npy/test_images.npy", "cifar/batch"):
        yield Subject(place / Path(name).parent, Path(name).name, lambda file: [*open_images(file, 8).batches(64)])
    yield Subject(place / "cifar", "batch.tar.gz", lambda file: read_cifar(CIFAR10, file, "test"))
    for suffix in SUFFIXES:
        yield Subject(
            place / "pictures", f"train/ant/a{suffix}", lambda file: read_image_folder(file.parents[2], "test", 8)
        )


def trial(subject: Subject, number: int, folder: Path) -> str | None:
    file = shutil.copytree(subject.folder, folder / "copy") / subject.file
    file.write_bytes(mutated(file.read_bytes(), random.Random(f"{subject.file} {number}")))
    return in_child(lambda: subject.read(file) and None, SECONDS, 2**30).fault


def files(place: Path) -> dict[str, Trial]:
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    each = [(subject, number) for subject in subjects(place) for number in range(MUTATIONS)]
    return {f"{one.folder.name}/{one.file}, mutation {number}": partial(trial, one, number) for one, number in each}


ATTACKS = (Attack("mutated files", files, short=100, middle=900),)
