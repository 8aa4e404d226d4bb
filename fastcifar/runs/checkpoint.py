"""Stores a run's state in folders of safetensors and JSON, published by renaming one pointer; none of it can execute.

checkpoints/latest                       the name of the current folder
checkpoints/STEP/weights.safetensors     parameters and buffers, contiguous; the metadata describes the network
checkpoints/STEP/NAME.safetensors        the same of the average NAME, such as ema-0.999 or swa
checkpoints/STEP/snapshot-N.safetensors  the same of the weights at the end of the cycle N of warm restarts
checkpoints/STEP/best-NAME.safetensors   the same of the weights or the average NAME, best on the validation split
checkpoints/STEP/state.safetensors       the rest of the training state: momenta, meters, random state
checkpoints/STEP/progress.json           epoch, batch, times, the names of averages and snapshots, the best epochs
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from fastcifar.checks import check_range
from fastcifar.errors import FastcifarError
from fastcifar.runs.files import publish, read_json, reading, write_bytes, write_text, writing
from fastcifar.serialization import build

RESTART = "start the run again"

WEIGHTS = "weights"
"""Name of the weights themselves, among their averages."""


class Best(TypedDict):
    """Scores of the best epoch's weights on the validation split."""

    epoch: int
    accuracy: float
    loss: float


class Progress(TypedDict):
    epoch: int
    """Epochs done."""
    batch: int
    """Batches done in the current epoch."""
    step: int
    elapsed: float
    """Seconds, without the time between an interruption and resuming."""
    seconds: dict[str, float]
    """By phase."""
    scaler: dict[str, Any]
    """State of the gradient scaler; empty where the precision needs none."""
    plateau: dict[str, float]
    """State of a plateau schedule; empty for the others."""
    averages: list[str]
    snapshots: list[str]
    best: dict[str, Best]
    """By name of the weights; empty without a validation split."""


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

OWN = re.compile(r"[0-9]{8,}|\.[0-9]{8,}\.partial")
"""Folders that `save` makes, and may remove."""


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Publishes `checkpoint` in `folder`, then removes the one before it; if killed at any moment, a whole one remains.

    A step has one state only, so one that is already published is left alone. Raises FastcifarError where `folder`
    cannot be written, or its pointer is damaged; the earlier checkpoint stays.
    """
    name = f"{checkpoint.progress['step']:08d}"
    partial, target = folder / f".{name}.partial", folder / name
    if latest(folder) == target:
        return
    with writing(folder):
        for leftover in (partial, target):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            write(partial, checkpoint)
            publish(partial, target)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        write_text(folder / "latest", name + "\n")
        for other in folder.iterdir():
            if OWN.fullmatch(other.name) and other != target:
                shutil.rmtree(other, ignore_errors=True)


def write(folder: Path, checkpoint: Checkpoint) -> None:
    folder.mkdir(parents=True)
    metadata = {"network": json.dumps(checkpoint.network)}
    for file, tensors in checkpoint.files().items():
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_bytes(folder / f"{file}.safetensors", serialize(contiguous, metadata))
    write_text(folder / "progress.json", json.dumps(checkpoint.progress, indent=2) + "\n")


def latest(folder: Path) -> Path | None:
    """Returns the current checkpoint's folder; None before the first. Raises FastcifarError on a damaged pointer."""
    pointer = folder / "latest"
    if not os.path.isfile(pointer):
        return None
    with reading(pointer, "write the name of a checkpoint beside it there, or start the run again"):
        name = pointer.read_text("utf-8").strip()
        if not re.fullmatch("[0-9]+", name) or not (folder / name).is_dir():
            raise ValueError("it names no checkpoint beside it")
    return folder / name


def load(folder: Path) -> Checkpoint | None:
    """Loads the current checkpoint to the CPU; None before the first. Raises FastcifarError where a file is damaged."""
    current = latest(folder)
    if current is None:
        return None
    progress = read_json(current / "progress.json", Progress, RESTART)
    names = (WEIGHTS, *progress["averages"], *progress["snapshots"])
    if bad := [name for name in (*names, *progress["best"]) if not NAME.fullmatch(name)]:
        raise FastcifarError(f"{current / 'progress.json'} names {bad[0]!r}, which no weights are called; {RESTART}.")
    return Checkpoint(
        weights={name: read_tensors(current / f"{name}.safetensors") for name in names},
        best={name: read_tensors(current / f"best-{name}.safetensors") for name in progress["best"]},
        state=read_tensors(current / "state.safetensors"),
        progress=progress,
        network=read_network(current / "weights.safetensors"),
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a file. Raises FastcifarError where it is missing or damaged."""
    with reading(path, RESTART), safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_network(path: Path) -> Network:
    """Reads how to build and feed the network of a file of weights. Raises FastcifarError where it does not say."""
    with reading(path, RESTART), safe_open(path, framework="pt") as file:
        network = build(Network, json.loads((file.metadata() or {}).get("network", "{}")), "network", complete=True)
        for mean, std in zip(network["mean"], network["std"], strict=True):
            check_range("mean", mean, 0, 1)
            check_range("std", std, 0, 1, exclusive=True)
        return network


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copies `weights` into the tensors of `model`. Raises FastcifarError, as `copy_tensors`, where they do not fit."""
    copy_tensors(weights, model.state_dict(), source)


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
