"""Several runs of a recipe at a time: which they are, how many and with what share; each is as if alone."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import made_run
import numpy
import pytest
import torch
from made_run import weight_files

from fastcifar.config import AverageConfig, DataConfig, EngineConfig
from fastcifar.data.splits import validation_split
from fastcifar.engine.memory import DataSize
from fastcifar.engine.run import train
from fastcifar.errors import ConfigError
from fastcifar.many import packed
from fastcifar.many.jobs import Job, Overrides
from fastcifar.many.packed import (
    divide,
    how_many,
    most_at_once,
    parse_seeds,
    plan_members,
    shares_the_gpu,
    train_packed,
)
from fastcifar.recipes import RECIPES
from fastcifar.runs.console import Silence
from fastcifar.runs.folder import Run
from fastcifar.runs.interrupt import Interrupted

CONFIG = replace(
    made_run.CONFIG, average=AverageConfig((0.9,)), engine=EngineConfig("cpu", compile="off", threads=1), batch_size=100
)


@pytest.mark.parametrize("text", ["", "3..1", "a", "0..", "-1", "0..99999", "1,,2", "0..3,2"])
def test_seeds(text):
    assert [parse_seeds(known) for known in ("4", "7,2", "0..1, 5")] == [(4,), (7, 2), (0, 1, 5)]
    with pytest.raises(ConfigError, match=r"are not known; write 0\.\.10|name one twice"):
        parse_seeds(text)


def test_the_members_of_report_5():
    """The members are as report 5 trained them, but for images to choose by, which all set apart alike.

    The test set is not watched.
    """
    entry = RECIPES["r5_ensemble_member"]
    members = plan_members(entry, range(11), Path("nowhere"), Overrides(val_split=5000))
    assert [(job.config.seed, job.folder.name) for job in members] == [(seed, f"seed{seed}") for seed in range(11)]
    labels, config = torch.arange(50_000) % 10, members[0].config
    splits = [validation_split(labels, job.config.data.val_split, job.config.data.split_seed, 10)[1] for job in members]
    assert all(torch.equal(splits[0], split) for split in splits)
    assert len(splits[0]) == 5000
    assert (config.model.arch, config.optim.optimizer, config.schedule.schedule) == ("resnet18", "adam", "step")
    assert (config.loss.loss, config.data.augment, config.average.decays) == ("asymmetric", "standard", ())
    assert (config.optim.sharpness, config.watch_test, config.epochs) == ("none", False, entry.config.epochs)


def test_a_folder_of_another_length_or_reading_is_refused(tmp_path):
    entry = RECIPES["quickstart"]
    first, second = plan_members(entry, (0, 1), tmp_path, Overrides(epochs=2))
    Run.create(second.folder, second.config)
    assert plan_members(entry, (0, 1), tmp_path, Overrides(epochs=2)) == [first, second]
    for seeds, overrides, expected in [
        ((0, 1), Overrides(epochs=3), "seed1 holds a run of 2 epochs in place of 3; choose another --out"),
        ((0, 1), Overrides(epochs=2, val_split=50), "val_split changed"),
        ((0,), Overrides(), "give more --seeds, or a recipe that keeps snapshots"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            plan_members(entry, seeds, tmp_path, overrides)


@pytest.mark.parametrize(
    ("threads", "free", "expected"),
    [(None, 64, 8), (2, 64, 4), (3, 64, 2), (16, 64, 1), (None, 4, 3), (None, 1, 1), (None, None, 8), (16, None, 1)],
)
def test_how_many_suit_the_threads_and_the_memory(monkeypatch, threads, free, expected):
    """A run of this size takes a GiB, a tenth stays free, and none is begun on less.

    Where memory is not told, the threads alone count.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(packed, "free_memory", lambda device: free and free * 2**30)
    small = replace(made_run.CONFIG, engine=EngineConfig("cpu", threads=threads))
    assert how_many(small, DataSize(100, 10)) == expected


def test_runs_share_a_gpu_only_under_the_multi_process_service(monkeypatch, tmp_path):
    assert most_at_once("cuda", 16, None, mps=False) == 1
    assert most_at_once("cuda", 16, 4, mps=True) == 8
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert not shares_the_gpu()
    (tmp_path / "control").touch()
    assert shares_the_gpu()


def test_what_is_given_is_not_divided(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(packed, "free_memory", lambda device: 6 * 2**30)
    assert divide(EngineConfig("cpu"), 3) == EngineConfig("cpu", threads=2, memory_limit="2048MB")
    assert divide(EngineConfig("cpu"), 1) == EngineConfig("cpu", threads=8)
    given = EngineConfig("cpu", threads=5, memory_limit="2GB")
    assert divide(given, 3) == given


@pytest.mark.slow
def test_packed_runs_that_were_stopped_end_in_the_bytes_of_single_ones(tmp_path):
    """Thread counts are equal; processes save what they have when the parent lets them go; what has ended is kept."""
    draw, arrays = torch.Generator().manual_seed(0), {}
    for split, count in (("train", 2000), ("test", 300)):
        arrays[f"{split}_images"] = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=draw).numpy()
        arrays[f"{split}_labels"] = (torch.arange(count) % 10).numpy()
    numpy.savez(tmp_path / "images.npz", **arrays)
    configs = [replace(CONFIG, seed=seed, data=DataConfig(str(tmp_path / "images.npz"))) for seed in (0, 1)]
    jobs = [Job(RECIPES["quickstart"], config, tmp_path / "packed" / f"seed{config.seed}") for config in configs]

    def interrupt() -> None:
        while not all(weight_files(job.folder) for job in jobs):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        train_packed(jobs, 2, Silence())
    thread.join()
    assert not any(job.result for job in jobs)
    train_packed(jobs, 2, Silence())
    for config, job in zip(configs, jobs, strict=True):
        train(config, tmp_path / f"alone{config.seed}")
        assert weight_files(job.folder) == weight_files(tmp_path / f"alone{config.seed}")
    assert weight_files(jobs[0].folder) != weight_files(jobs[1].folder)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    train_packed(jobs, None, Silence())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
