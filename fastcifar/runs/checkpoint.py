"""The state of a run on disk: folders of safetensors and JSON, published by renaming one pointer; nothing in them can
execute.

checkpoints/latest                       the name of the current folder
checkpoints/STEP/weights.safetensors     parameters and buffers, contiguous; the metadata describes the network
checkpoints/STEP/NAME.safetensors        the same of the average NAME, such as ema-0.999 or swa
checkpoints/STEP/snapshot-N.safetensors  the same of the weights at the end of the cycle N of warm restarts
checkpoints/STEP/best-NAME.safetensors   the same of the weights or the average NAME, best on the validation split
checkpoints/STEP/state.safetensors       what else training goes on from: momenta, meters, random state
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
"""The name of the weights themselves, among their averages."""


class Best(TypedDict):
    """How good the weights of the best epoch were on the validation split."""

    epoch: int
    accuracy: float
    loss: float


class Progress(TypedDict):
    """How far a run has come."""

    epoch: int
    """Epochs done."""
    batch: int
    """Batches done of the epoch after them."""
    step: int
    """Steps done in all."""
    elapsed: float
    """Seconds, those between an end and a resumption left out."""
    seconds: dict[str, float]
    """By phase."""
    scaler: dict[str, Any]
    """State of the gradient scaler; empty where the precision needs none."""
    plateau: dict[str, float]
    """State of a schedule that waits for plateaus; empty for the others."""
    averages: list[str]
    """Names of the averages that are kept."""
    snapshots: list[str]
    """Names of the weights that were kept at the ends of cycles."""
    best: dict[str, Best]
    """By name of the weights; empty without a validation split."""


class Network(TypedDict):
    """How to build and feed the network that weights belong to."""

    arch: str
    options: dict[str, Any]
    """Options of `build_model`, with `classes` and `image_size`."""
    classes: list[str]
    """Their names."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """The deviation of the normalisation, like its mean as fractions of 255."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by file name and key, and numbers."""

    weights: dict[str, dict[str, Tensor]]
    """The last ones, by name: `weights`, and the averages; and the snapshots."""
    best: dict[str, dict[str, Tensor]]
    """The same of the best epochs on the validation split; empty without one."""
    state: dict[str, Tensor]
    progress: Progress
    network: Network

    @property
    def chosen(self) -> dict[str, dict[str, Tensor]]:
        """What the run came to: the best weights of each name, else the last."""
        return {name: self.best.get(name, last) for name, last in self.weights.items()}

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by the name of their file."""
        return {**self.weights, **{f"best-{name}": tensors for name, tensors in self.best.items()}, "state": self.state}


SNAPSHOT = re.compile(r"snapshot-[1-9][0-9]*")
NAME = re.compile(rf"weights|swa|ema-[0-9.e-]+|{SNAPSHOT.pattern}")
"""What weights may be called, and so their files."""

OWN = re.compile(r"[0-9]{8,}|\.[0-9]{8,}\.partial")
"""Names of the folders that `save` makes, and may remove."""


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Publishes `checkpoint` in `folder`, then removes the one before it; killed at any moment, it leaves a whole one.

    A step has one state only, so one that is published already is left alone.

    Raises:
        FastcifarError: `folder` cannot be written, or its pointer is damaged; the checkpoint before stays.
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
    """Makes `folder`, with the files of `checkpoint`."""
    folder.mkdir(parents=True)
    metadata = {"network": json.dumps(checkpoint.network)}
    for file, tensors in checkpoint.files().items():
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_bytes(folder / f"{file}.safetensors", serialize(contiguous, metadata))
    write_text(folder / "progress.json", json.dumps(checkpoint.progress, indent=2) + "\n")


def latest(folder: Path) -> Path | None:
    """The current checkpoint's folder, or None before the first. Raises FastcifarError where the pointer is damaged."""
    pointer = folder / "latest"
    if not os.path.isfile(pointer):
        return None
    with reading(pointer, "write the name of a checkpoint beside it there, or start the run again"):
        name = pointer.read_text("utf-8").strip()
        if not re.fullmatch("[0-9]+", name) or not (folder / name).is_dir():
            raise ValueError("it names no checkpoint beside it")
    return folder / name


def load(folder: Path) -> Checkpoint | None:
    """The current checkpoint, on the CPU; None before the first. Raises FastcifarError where a file is damaged."""
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
    """The tensors of a file. Raises FastcifarError where it is missing or damaged."""
    with reading(path, RESTART), safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_network(path: Path) -> Network:
    """How to build and feed the network of the weights in a file. Raises FastcifarError where that is not said."""
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
    """Copies what was `stored` into the tensors of the same names in `own`, which keep their device and memory format.

    Raises:
        FastcifarError: names, shapes or types differ; nothing was copied, and the sentence begins with `source`.
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
