"""A run folder with a small network that was never trained, an ensemble of such runs, and their data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from made_run import PROGRESS

from fastcifar.config import DataConfig, EngineConfig, ModelConfig, RunConfig
from fastcifar.models import build_model
from fastcifar.runs import checkpoint as checkpoints
from fastcifar.runs.checkpoint import Best, Checkpoint
from fastcifar.runs.ensembles import EnsembleReport, Member, Vote, write_report
from fastcifar.runs.folder import Run
from fastcifar.runs.network import read_network

CLASSES = ("ant", "bee, wild", "cat")
SIZE = 8
OPTIONS = {"blocks": [1, 1], "channels": [4, 8], "pre_activation": True, "final_norm": True}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NETWORK = {"arch": "resnet", "options": OPTIONS | {"image_size": SIZE}, "classes": list(CLASSES)}
NETWORK |= {"mean": MEAN, "std": STD}


def images_like(count: int, size: int = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def make_data(folder: Path) -> Path:
    """Makes a .npz file such as `data.arrays` reads, of 60 images to train on and 70 to test on."""
    arrays = {"classes": np.array(CLASSES)}
    for seed, (split, count) in enumerate({"train": 60, "test": 70}.items(), start=1):
        arrays |= {f"{split}_images": images_like(count, seed=seed), f"{split}_labels": np.arange(count) % len(CLASSES)}
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def small_network() -> torch.nn.Module:
    return build_model("resnet", classes=len(CLASSES), image_size=SIZE, **OPTIONS)


def make_weights(seed: int) -> dict[str, torch.Tensor]:
    """Draws weights whose batch norm statistics are not those of a new network, and whose outputs differ."""
    torch.manual_seed(seed)
    weights = dict(small_network().state_dict())
    for name, tensor in weights.items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.2)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    weights["classifier.weight"] *= 4
    return weights


def make_run(
    path: Path,
    dataset: Path,
    *,
    seed: int = 0,
    val_split: int = 0,
    best: dict[str, Best] | None = None,
    averages: tuple[str, ...] = ("ema-0.999",),
    snapshots: int = 0,
    run_seed: int = 0,
    split_seed: int = 0,
    images: dict[str, str] | None = None,
    **changes: object,
) -> Path:
    """Makes a run at its end, with so many snapshots; `changes` replace entries of its checkpoint's network.

    The weights, then the averages, then the snapshots are those of `make_weights` by the seeds from `seed` on; the best
    ones by those from `seed` + 100 on.
    """
    data = DataConfig(str(dataset), val_split=val_split, split_seed=split_seed)
    model = ModelConfig("resnet", blocks=(1, 1), channels=(4, 8), pre_activation=True, final_norm=True)
    run = Run.create(path, RunConfig(model, data, engine=EngineConfig("cpu", "fp32"), epochs=2, seed=run_seed))
    kept = [f"snapshot-{number}" for number in range(1, snapshots + 1)]
    weights = {name: make_weights(seed + shift) for shift, name in enumerate(("weights", *averages, *kept))}
    chosen = {name: make_weights(seed + 100 + shift) for shift, name in enumerate(best or {})}
    progress = PROGRESS | {"averages": list(averages), "snapshots": kept, "best": best or {}}
    progress |= {"images": images} if images else {}
    checkpoints.save(run.checkpoints, Checkpoint(weights, chosen, {}, progress, NETWORK | changes))
    return path


VOTERS = ((0, "ema-0.999"), (2, "weights"))
"""Seed and weights of the members that vote in `make_ensemble`."""


def make_ensemble(path: Path, dataset: Path) -> Path:
    for seed in range(3):
        make_run(path / f"seed{seed}", dataset, seed=10 * seed, run_seed=seed, val_split=20)
    weights = dict(VOTERS) | {1: "weights"}
    members = tuple(Member(Path(f"seed{seed}"), weights[seed], 0.5, 0.5) for seed in range(3))
    whole, chosen = (Vote(voting, 0.5, 0.5, (0.4, 0.6), 0.5, 0, 0.25, 0.5, 0.1, 0.5) for voting in ((0, 1, 2), (0, 2)))
    write_report(path, EnsembleReport(str(dataset), 70, "none", members, whole, chosen, None, (whole,)))
    return path


def logits_of(run: Path, images: torch.Tensor | np.ndarray, which: str | None = None) -> torch.Tensor:
    """Returns the outputs of the run's network for images uint8 (N, H, W, 3), in float32, without the classifier."""
    network = read_network(run).load(torch.device("cpu"), which)
    scale, offset = network.normalization.affine(torch.device("cpu"))
    with torch.no_grad():
        return network.model((torch.as_tensor(images) * scale + offset).permute(0, 3, 1, 2))


def mean_of_voters(ensemble: Path, images: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Returns the mean of the softmax of the members that vote in `make_ensemble`, (N, classes)."""
    return torch.stack([logits_of(ensemble / f"seed{seed}", images, name).softmax(1) for seed, name in VOTERS]).mean(0)
