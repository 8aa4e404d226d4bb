"""The state of a run on disk: folders of safetensors and JSON, published by renaming one pointer; nothing in them can execute.

checkpoints/latest                     the name of the current folder
checkpoints/STEP/weights.safetensors   parameters and buffers, contiguous; the metadata says how to build and feed the network
checkpoints/STEP/averaged.safetensors  the same of the averaged weights, where the run keeps them
checkpoints/STEP/state.safetensors     what else training goes on from: momenta, meters, random state
checkpoints/STEP/progress.json         epoch, batch, times
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from fastcifar.errors import FastcifarError
from fastcifar.runs.files import write_text


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by file name and key, and numbers."""

    weights: dict[str, Tensor]
    averaged: dict[str, Tensor]
    """Empty where the run keeps no average."""
    state: dict[str, Tensor]
    progress: dict[str, Any]
    network: dict[str, Any] = field(default_factory=dict)
    """How to build and feed the network: arch, options, classes, image_size, mean, std."""


FILES = ("weights", "averaged", "state")


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Publishes `checkpoint` in `folder`, then removes the one before it; killed at any moment, it leaves one that is whole.

    A step has one state only, so one that is published already is left alone.
    """
    name = f"{checkpoint.progress['step']:08d}"
    partial, target = folder / f".{name}.partial", folder / name
    if latest(folder) == target:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    metadata = {"network": json.dumps(checkpoint.network)}
    for file in FILES:
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in getattr(checkpoint, file).items()}
        if tensors:
            (partial / f"{file}.safetensors").write_bytes(serialize(tensors, metadata))
    write_text(partial / "progress.json", json.dumps(checkpoint.progress, indent=2) + "\n")
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    write_text(folder / "latest", name + "\n")
    for other in folder.iterdir():
        if other.is_dir() and other != target:
            shutil.rmtree(other, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The current checkpoint's folder, or None before the first. Raises FastcifarError where the pointer is damaged."""
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    if not name.isdigit() or not (folder / name).is_dir():
        raise FastcifarError(f"{pointer} names no checkpoint beside it; write the name of one there, or start the run again.")
    return folder / name


def load(folder: Path) -> Checkpoint | None:
    """The current checkpoint, on the CPU, or None before the first. Raises FastcifarError where a file is damaged."""
    current = latest(folder)
    if current is None:
        return None
    network, weights = read_tensors(current / "weights.safetensors")
    others = {file: read_tensors(current / f"{file}.safetensors")[1] for file in FILES[1:] if (current / f"{file}.safetensors").exists()}
    try:
        progress = json.loads((current / "progress.json").read_text())
    except (OSError, ValueError) as error:
        raise FastcifarError(f"{current / 'progress.json'} cannot be read ({error}); start the run again.") from error
    return Checkpoint(weights, others.get("averaged", {}), others.get("state", {}), progress, network)


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `network` metadata and the tensors of a file. Raises FastcifarError where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            network = json.loads((file.metadata() or {}).get("network", "{}"))
            return network, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise FastcifarError(f"{path} cannot be read ({error}); it is no whole safetensors file: start the run again.") from error


@torch.no_grad()
def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copies `weights` into the tensors of `model`, which keep their memory format. Raises FastcifarError where names or shapes differ."""
    own = model.state_dict()
    wrong = sorted(own.keys() ^ weights.keys()) or [key for key in own if own[key].shape != weights[key].shape]
    if wrong:
        raise FastcifarError(f"{source} does not fit the network: {wrong[0]} differs; give the configuration that it was trained with.")
    for key, tensor in own.items():
        tensor.copy_(weights[key])
