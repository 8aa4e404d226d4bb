"""Stores a run's state in folders of safetensors and JSON, each published whole by renaming it; none of it can execute.

checkpoints/STEP/weights.safetensors     parameters and buffers, contiguous; the metadata describes the network
checkpoints/STEP/NAME.safetensors        the same of the average NAME, such as ema-0.999 or swa
checkpoints/STEP/snapshot-N.safetensors  the same of the weights at the end of the cycle N of warm restarts
checkpoints/STEP/best-NAME.safetensors   the same of the weights or the average NAME, best on the validation split
checkpoints/STEP/state.safetensors       the rest of the training state: momenta, meters, random state
checkpoints/STEP/progress.json           epoch, batch, times, the names of averages and snapshots, the best epochs
checkpoints/STEP/SHA256SUMS              digests of these files, as sha256sum writes and checks them
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from fastcifar.checks import check_range
from fastcifar.errors import FastcifarError
from fastcifar.runs.files import check_regular, exists, publish, read_json, reading, write_bytes, write_text, writing
from fastcifar.serialization import build

RESTART = "start the run again"

WEIGHTS = "weights"
"""Name of the weights themselves, among their averages."""


class Best(TypedDict):
    """Scores of the best epoch's weights on the validation split."""

    epoch: int
    accuracy: float
    loss: float


class Digests(TypedDict, total=False):
    images: dict[str, str]
    """Digests of the training and the test set, by split; missing in runs of earlier versions."""


class Progress(Digests):
    epoch: int
    """Epochs done."""
    batch: int
    """Batches done in the current epoch."""
    step: int
    elapsed: float
    """Seconds, without the time between an interruption and resuming."""
    seconds: dict[str, float]
    """Seconds spent in each phase."""
    scaler: dict[str, Any]
    """State of the gradient scaler; empty where the precision needs none."""
    plateau: dict[str, float]
    """State of a plateau schedule; empty for the others."""
    averages: list[str]
    snapshots: list[str]
    best: dict[str, Best]
    """The best epochs by name of the weights; empty without a validation split."""


class Network(TypedDict):
    """How to build and feed the network that weights belong to."""

    arch: str
    options: dict[str, Any]
    """Options of `build_model`, with `classes` and `image_size`."""
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Standard deviation of the normalisation; like `mean`, in fractions of 255."""


@dataclass(frozen=True)
class Checkpoint:
    """A run's state: tensors by file name and key, and numbers."""

    weights: dict[str, dict[str, Tensor]]
    """The last weights, the averages and the snapshots, by name."""
    best: dict[str, dict[str, Tensor]]
    """The best epochs' weights on the validation split, by name; empty without one."""
    state: dict[str, Tensor]
    progress: Progress
    network: Network

    @property
    def chosen(self) -> dict[str, dict[str, Tensor]]:
        """The best weights of each name, else the last."""
        return {name: self.best.get(name, last) for name, last in self.weights.items()}

    def files(self) -> dict[str, dict[str, Tensor]]:
        return {**self.weights, **{f"best-{name}": tensors for name, tensors in self.best.items()}, "state": self.state}


SNAPSHOT = re.compile(r"snapshot-[1-9][0-9]*")
NAME = re.compile(rf"weights|swa|ema-[0-9.e-]+|{SNAPSHOT.pattern}")
"""Allowed names of weights, and so of their files."""

STEP = re.compile("[0-9]{8,}")
OWN = re.compile(rf"{STEP.pattern}|\.{STEP.pattern}\.partial")
"""Folders that `save` makes, and `sweep` may remove."""
SUMS = "SHA256SUMS"


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Publishes `checkpoint` in `folder`, then removes the one before it; if killed at any moment, a whole one remains.

    A step has one state only, so one that is already published is left alone. Raises FastcifarError where `folder`
    cannot be written; the earlier checkpoint stays.
    """
    name = f"{checkpoint.progress['step']:08d}"
    partial, target = folder / f".{name}.partial", folder / name
    with writing(folder):
        folder.mkdir(exist_ok=True)
        if latest(folder) != target:
            remove(partial)
            try:
                write(partial, checkpoint)
                publish(partial, target)
                (folder / "latest").unlink(missing_ok=True)  # in which earlier versions named the current checkpoint
            except Exception:
                remove(partial)
                raise
    sweep(folder)


def sweep(folder: Path) -> None:
    """Removes what earlier and killed saves left beside the current checkpoint; follows no links."""
    with writing(folder):
        current = latest(folder)
        for other in folder.iterdir() if exists(folder) else ():
            if other != current and OWN.fullmatch(other.name):
                remove(other)


def remove(folder: Path) -> None:
    """Removes a folder, or the link in its place, as far as that can be done."""
    with suppress(OSError):
        if folder.is_symlink():
            folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def write(folder: Path, checkpoint: Checkpoint) -> None:
    folder.mkdir()
    metadata, sums = {"network": json.dumps(checkpoint.network)}, []

    def put(name: str, content: bytes) -> None:
        write_bytes(folder / name, content)
        sums.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")

    for file, tensors in checkpoint.files().items():
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        put(f"{file}.safetensors", serialize(contiguous, metadata))
    put("progress.json", f"{json.dumps(checkpoint.progress, indent=2)}\n".encode())
    write_text(folder / SUMS, "".join(sums))


def latest(folder: Path) -> Path | None:
    """Returns the current checkpoint's folder; None before the first. Raises FastcifarError where that is not known."""
    if not exists(folder):
        return None
    with reading(folder, "make it readable"), os.scandir(folder) as entries:
        # Links are no checkpoints: `sweep` could not remove them.
        steps = [entry.name for entry in entries if STEP.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
    return folder / max(steps, key=int) if steps else None


def load(folder: Path) -> Checkpoint | None:
    """Loads the current checkpoint to the CPU; None before the first. Raises FastcifarError where a file is damaged."""
    current = latest(folder)
    if current is None:
        return None
    sums = read_sums(current / SUMS)
    check_digest(current / "progress.json", sums)
    progress = read_json(current / "progress.json", Progress, RESTART)
    if sums is None and "images" in progress:
        raise FastcifarError(f"{current / SUMS} is missing; {RESTART}.")
    names = (WEIGHTS, *progress["averages"], *progress["snapshots"])
    if bad := [name for name in (*names, *progress["best"]) if not NAME.fullmatch(name)]:
        raise FastcifarError(f"{current / 'progress.json'} names {bad[0]!r}, which no weights are called; {RESTART}.")

    def tensors(name: str) -> dict[str, Tensor]:
        check_digest(path := current / f"{name}.safetensors", sums)
        with reading(path, RESTART), safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    return Checkpoint(
        weights={name: tensors(name) for name in names},
        best={name: tensors(f"best-{name}") for name in progress["best"]},
        state=tensors("state"),
        progress=progress,
        network=read_network(current / "weights.safetensors"),
    )


def read_sums(path: Path) -> dict[str, str] | None:
    """Reads the digests of a checkpoint's files, by name; None where there are none, as in runs of earlier versions."""
    if not exists(path):
        return None
    with reading(path, RESTART):
        return {name: digest for digest, name in re.findall(r"(\w+)  (.+)\n", path.read_text("utf-8"))}


def check_digest(path: Path, sums: Mapping[str, str] | None) -> None:
    """Raises FastcifarError where the file is missing, or is not what was written."""
    with reading(path, RESTART):
        check_regular(path)
        with open(path, "rb") as file:
            if sums is not None and sums.get(path.name) != hashlib.file_digest(file, "sha256").hexdigest():
                raise ValueError(f"it is damaged: its digest is not the one in {SUMS}")


def read_network(path: Path) -> Network:
    """Reads how to build and feed the network of a file of weights. Raises FastcifarError where it does not say."""
    with reading(path, RESTART), safe_open(path, framework="pt") as file:
        network = build(Network, json.loads((file.metadata() or {}).get("network", "{}")), "network", complete=True)
        for mean, std in zip(network["mean"], network["std"], strict=True):
            check_range("mean", mean, 0, 1)
            check_range("std", std, 0, 1, exclusive=True)
        return network


@torch.no_grad()
def copy_tensors(stored: dict[str, Tensor], own: dict[str, Tensor], source: str) -> None:
    """Copies the `stored` tensors into those of the same names in `own`, which keep their device and memory format.

    Raises FastcifarError, which begins with `source`, where names, shapes or types differ; nothing is copied then.
    """
    remedy = "give the configuration that it was made with"
    if differing := stored.keys() ^ own.keys():
        key = min(differing)
        raise FastcifarError(f"{source} {'lacks' if key in own else 'has an unknown'} {key}; {remedy}.")
    for key, tensor in own.items():
        found, expected = (f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in (stored[key], tensor))
        if found != expected:
            raise FastcifarError(f"{source} has {key} as {found}, expected {expected}; {remedy}.")
    for key, tensor in own.items():
        tensor.copy_(stored[key])
