"""A run folder made by hand: a small network that was never trained."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fastcifar.config import DataConfig, ModelConfig, RunConfig
from fastcifar.models import build_model
from fastcifar.runs import checkpoint as checkpoints
from fastcifar.runs.checkpoint import Checkpoint
from fastcifar.runs.folder import Result, Run
from fastcifar.runs.records import EpochRecord, JsonLines

CONFIG = RunConfig(ModelConfig("resnet", blocks=(1, 1), channels=(4, 8)), DataConfig("synthetic"), epochs=2)
PROGRESS = {"epoch": 2, "batch": 0, "step": 8, "elapsed": 3.5, "seconds": {"train": 3.0}, "scaler": {}}
PROGRESS |= {"plateau": {}, "averages": ["ema-0.999"], "snapshots": []}
PROGRESS |= {"best": {"weights": {"epoch": 1, "accuracy": 0.5, "loss": 0.7}}}
NETWORK = {
    "arch": "resnet",
    "options": {"blocks": [1, 1], "channels": [4, 8], "classes": 2, "image_size": 8},
    "classes": ["ant", "bee"],
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 1.0),
}
RESULT = Result(
    test_accuracy=0.5,
    validation_accuracy=0.5,
    averaged_test_accuracy=0.25,
    averaged_test_accuracies={"ema-0.999": 0.25},
    chosen_epochs={"weights": 1},
    watched_test_accuracy=None,
    images_per_second=1234.0,
    seconds=3.5,
    seconds_by_phase={"train": 3.0},
    flop_utilization=None,
    peak_memory_bytes=2**20,
    parameters=1000,
    recipe=None,
    device="a CPU",
    versions={"python": "3.11"},
    commit=None,
)


def record(epoch: int, **changes: Any) -> EpochRecord:
    """Returns the record of an epoch of four steps, in a run of two epochs; whatever may be None is None."""
    known = {
        "epochs": 2,
        "step": 4 * epoch,
        "lr": 0.1,
        "train_loss": 1.5,
        "train_accuracy": 0.25,
        "images_per_second": 1e3,
        "seconds": 2.0,
    }
    known |= {"averaged_validation_accuracies": {}, "averaged_test_accuracies": {}}
    return EpochRecord(
        **dict.fromkeys(field.name for field in fields(EpochRecord)) | known | {"epoch": epoch} | changes
    )


def checkpoint(step: int = 8) -> Checkpoint:
    """Returns a checkpoint of the small network.

    Its weights are held in channels_last, with an average and the weights of a better epoch.
    """
    model = build_model(NETWORK["arch"], **NETWORK["options"]).to(memory_format=torch.channels_last)
    weights = dict(model.state_dict())
    state = {"random": torch.arange(5, dtype=torch.uint8), "meter": torch.zeros(3, dtype=torch.float64)}
    averaged, best = ({key: tensor + shift for key, tensor in weights.items()} for shift in (1, 2))
    return Checkpoint(
        {"weights": weights, "ema-0.999": averaged}, {"weights": best}, state, {**PROGRESS, "step": step}, NETWORK
    )


def weight_files(run: Path) -> dict[str, bytes]:
    """Returns the bytes of the run's only checkpoint, but for `progress.json`, whose times differ."""
    return {file.name: file.read_bytes() for file in run.glob("checkpoints/[0-9]*/*.safetensors")}


def make_run(path: Path) -> Run:
    """Makes a folder with every file of a run that has ended."""
    run = Run.create(path, CONFIG)
    lines = JsonLines(run.metrics, 0)
    for epoch in (1, 2):
        lines.write(record(epoch))
    lines.close()
    checkpoints.save(run.checkpoints, checkpoint())
    run.write_result(RESULT)
    return run
