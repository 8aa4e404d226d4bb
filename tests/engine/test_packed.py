"""Several runs at a time: each is the run that it would have been alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastcifar.config import AverageConfig, DataConfig, EngineConfig, ModelConfig, RunConfig
from fastcifar.engine.packed import train_packed
from fastcifar.engine.reproduce import Task
from fastcifar.engine.run import train
from fastcifar.recipes import RECIPES

CONFIG = RunConfig(
    model=ModelConfig("resnet", blocks=(1,), channels=(8,)),
    data=DataConfig("synthetic"),
    average=AverageConfig((0.9,)),
    engine=EngineConfig(device="cpu", compile="off", threads=1),
    epochs=1,
    batch_size=500,
)


def weight_files(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As they were: a run sets them for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_packed_runs_end_in_the_bytes_of_single_ones(tmp_path):
    """At equal thread counts; and what has ended is kept."""
    configs = [replace(CONFIG, seed=seed) for seed in (0, 1)]
    tasks = [Task(RECIPES["quickstart"], config, tmp_path / "packed" / f"seed{config.seed}") for config in configs]
    train_packed(tasks, at_once=2)
    for config, task in zip(configs, tasks, strict=True):
        train(config, tmp_path / f"alone{config.seed}")
        assert weight_files(task.folder) == weight_files(tmp_path / f"alone{config.seed}")
    assert weight_files(tasks[0].folder) != weight_files(tasks[1].folder)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    train_packed(tasks)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
