"""Mutates every file that the package reads: each is read, or refused in one sentence, in seconds and within 1 GiB."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastcifar.cli import starting_point
from fastcifar.data.arrays import read_arrays
from fastcifar.data.cifar import CIFAR10, read_cifar
from fastcifar.data.image_folder import read_image_folder
from fastcifar.errors import FastcifarError
from fastcifar.inference.images import open_images
from fastcifar.many.results import Row, read_rows, write_rows
from fastcifar.runs.ensembles import read_report
from fastcifar.runs.folder import Run
from fastcifar.runs.network import read_network
from fastcifar.runs.records import read_records

from .harness import Attack, Trial, Undisturbed, fastcifar, in_child, is_sentence

MUTATIONS, BLOCK, SECONDS = 600, 50, 5
"""Mutations of each file, how many share a child process, and how long one may take."""
KEPT: dict[str, tuple[int, ...]] = {}
"""Mutations beyond these that once went wrong, by the name of the file."""
TOKENS = ["null", "-1", "0", "1e999", "NaN", "[]", "{}", '""', '"\\u0000"', '"\\u001b[2J"', '"../../x"', "9" * 400, "[" * 9999]
"""What takes the place of a value in JSON."""
WORDS = [b"", b"\0", b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\n", b"%s", b"\x1b[2J", b"9" * 30]


@dataclass(frozen=True)
class Subject:
    """A file that is read, in a folder that has all that belongs to it."""

    folder: Path
    file: str
    read: Callable[[Path], object]
    """Reads what is in the folder, given the path of the file."""
    wrap: Callable[[bytes], bytes] = bytes
    """Applied after the mutation, such as a compression."""


def mutated(content: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + draw.choice((0, 1, 4, 8, 64, 10**9)))
        values = [*re.finditer(rb'(?<=[:\[,])\s*("[^"\n]*"|-?[\d.]+|null|true|false)', content[:20_000])]
        if values and draw.random() < 0.5:
            start, end = draw.choice(values).span()
            content = content[:start] + draw.choice(TOKENS).encode() + content[end:]
        elif content and draw.random() < 0.3:
            bit = draw.randrange(8 * len(content))
            content = b"%b%c%b" % (content[: bit // 8], content[bit // 8] ^ 1 << bit % 8, content[bit // 8 + 1 :])
        else:
            other = draw.randrange(len(content) + 1)
            middle = draw.choice((draw.choice(WORDS), draw.randbytes(4), content[other : other + 16]))
            content = content[:start] + middle + content[end:]
    return content


def fault_of(subject: Subject, folder: Path, content: bytes, name: str) -> str | None:
    file = folder / subject.file
    file.write_bytes(subject.wrap(mutated(content, random.Random(name))))
    try:
        subject.read(file)
    except FastcifarError as error:
        return None if is_sentence(str(error)) else f"ends in no sentence: {str(error)[:500]!r}"
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:200]}"
    return None


@cache
def faults(name: str, subject: Subject, numbers: tuple[int, ...]) -> dict[int, str]:
    """What goes wrong with these mutations. One at which the process dies is noted, and the others follow in a new one."""
    found, left = {}, list(numbers)
    folder = Path(shutil.copytree(subject.folder, f"{subject.folder}.{name.replace('/', '-')}", dirs_exist_ok=True))
    content = (subject.folder / subject.file).read_bytes()
    content = gzip.decompress(content) if subject.wrap is gzip.compress else content

    def act() -> None:
        for number in left:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            os.write(1, f"\n{json.dumps((number, fault_of(subject, folder, content, f'{name} {number}')))}\n".encode())

    while left:
        ended = in_child(act, memory=2**30)
        told = dict(json.loads(line) for line in ended.output.splitlines() if re.match(r"\[\d+, (null|\")", line))
        found |= {number: fault for number, fault in told.items() if fault}
        left = [number for number in left if number not in told]
        if left:
            found[left.pop(0)] = ended.fault or "dies"
    return found


def picture(folder: Path, suffix: str) -> Path:
    """An image folder of which one picture is to be mutated."""
    for part in ("train/ant", "train/bee", "test/ant", "test/bee"):
        (folder / part).mkdir(parents=True)
        image = Image.fromarray(np.random.default_rng(len(part)).integers(0, 256, (9, 8, 3), dtype=np.uint8))
        image.save(folder / part / f"a{suffix}")
    return folder


def arrays(folder: Path, data: Path) -> Path:
    folder.mkdir()
    for name, array in np.load(data).items():
        np.save(folder / f"{name}.npy", array)
    return folder


def batches(folder: Path) -> Path:
    """A CIFAR batch, alone and in an archive."""
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": rows, b"labels": [0, 1, 2, 3]}, protocol=2))
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        archive.add(folder / "data_batch_1", f"{CIFAR10.folder}/data_batch_1")
    (folder / "cifar.tar.gz").write_bytes(gzip.compress(plain.getvalue()))
    return folder


def subjects(place: Path) -> dict[str, Subject]:
    data, run = Undisturbed.make(place).data, place / "run"
    shutil.copytree(run, place / "other")
    ended = in_child(fastcifar("ensemble", run, place / "other", "--out", place / "ensemble"))
    assert ended.status == 0, ended.output
    (place / "rows").mkdir()
    row = Row("quickstart", 1, False, 0, {"epochs": 1}, 0.5, {"swa": 0.5}, None, 1.0, 1.0, "a CPU", {"torch": "2"}, None)
    write_rows(place / "rows" / "results.json", [row])
    (place / "images").mkdir()
    shutil.copy(data, place / "images")
    latest = f"checkpoints/{(run / 'checkpoints' / 'latest').read_text().strip()}"
    load: Callable[[Path], object] = lambda path: read_network(place / path.relative_to(place).parts[0]).load(torch.device("cpu"))
    pictured = lambda path: read_image_folder(path.parents[2], "train", 8)
    shown = lambda path: list(open_images(path, 8).batches(64))
    found = [
        Subject(run, "config.json", lambda path: (starting_point({"config": path}), Run(path.parent).config())),
        Subject(run, "metrics.jsonl", read_records),
        Subject(run, "result.json", lambda path: Run(path.parent).result()),
        Subject(place / "ensemble", "ensemble.json", lambda path: read_report(path.parent)),
        Subject(place / "rows", "results.json", read_rows),
        *(Subject(run, f"{latest}/{name}", load) for name in ("progress.json", "weights.safetensors", "state.safetensors")),
        Subject(run, "checkpoints/latest", load),
        Subject(place / "images", "data.npz", lambda path: read_arrays(path, "test")),
        *(
            Subject(arrays(place / f"{name}s", data), f"{name}.npy", lambda path: read_arrays(path.parent, "test"))
            for name in ("classes", "test_images", "train_labels")
        ),
        Subject(place / "classess", "test_images.npy", shown),
        Subject(batches(place / "cifar"), "data_batch_1", shown),
        Subject(place / "cifar", "cifar.tar.gz", lambda path: read_cifar(CIFAR10, path, "train"), gzip.compress),
        *(Subject(picture(place / suffix[1:], suffix), f"train/ant/a{suffix}", pictured) for suffix in (".png", ".jpg", ".webp", ".bmp")),
    ]
    return {f"{subject.folder.name}/{subject.file}": subject for subject in found}


def files(place: Path) -> dict[str, Trial]:
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")

    def trial(name: str, subject: Subject, number: int, folder: Path) -> str | None:
        first = number - number % BLOCK
        numbers = tuple(range(first, first + BLOCK)) if number < MUTATIONS else (number,)
        return faults(name, subject, numbers).get(number)

    return {
        f"{name}, mutation {number}": partial(trial, name, subject, number)
        for name, subject in subjects(place).items()
        for number in (*range(MUTATIONS), *KEPT.get(name, ()))
    }


ATTACKS = (Attack("mutated files", files, short=1000, middle=5000, block=BLOCK),)
