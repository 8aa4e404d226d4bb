"""Several runs at a time: each is the run that it would have been alone."""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from fastcifar.config import AverageConfig, DataConfig, EngineConfig, ModelConfig, RunConfig
from fastcifar.engine.run import train
from fastcifar.many.packed import train_packed
from fastcifar.many.reproduce import Task
from fastcifar.recipes import RECIPES
from fastcifar.runs.interrupt import Interrupted

IMAGES = Path(tempfile.gettempdir()) / f"fastcifar-packed-{os.getpid()}.npz"
CONFIG = RunConfig(
    model=ModelConfig("resnet", blocks=(1,), channels=(8,)),
    data=DataConfig(str(IMAGES)),
    average=AverageConfig((0.9,)),
    engine=EngineConfig(device="cpu", compile="off", threads=1),
    epochs=1,
    batch_size=100,
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


@pytest.fixture(scope="module", autouse=True)
def images() -> Iterator[None]:
    draw, arrays = torch.Generator().manual_seed(0), {}
    for split, count in (("train", 2000), ("test", 300)):
        arrays[f"{split}_images"] = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=draw).numpy()
        arrays[f"{split}_labels"] = (torch.arange(count) % 10).numpy()
    numpy.savez(IMAGES, **arrays)
    yield
    IMAGES.unlink()


@pytest.mark.slow
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


@pytest.mark.slow
def test_packed_runs_that_were_stopped_end_in_the_same_bytes(tmp_path):
    """The processes themselves save what they have when the parent lets them go."""
    configs = [replace(CONFIG, seed=seed, epochs=3) for seed in (0, 1)]
    whole, stopped = (
        [Task(RECIPES["quickstart"], one, tmp_path / name / f"seed{one.seed}") for one in configs]
        for name in ("a", "b")
    )
    train_packed(whole, at_once=2)

    def interrupt() -> None:
        while not all((task.folder / "checkpoints" / "latest").exists() for task in stopped):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        train_packed(stopped, at_once=2)
    thread.join()
    assert not any((task.folder / "result.json").exists() for task in stopped)
    train_packed(stopped, at_once=2)
    assert [weight_files(task.folder) for task in stopped] == [weight_files(task.folder) for task in whole]
