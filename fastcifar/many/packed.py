"""Runs of a recipe side by side on one device: which, how many, and with how many threads each.

Each is a process (`many.workers`), since random state, threads, memory limits and compiled code belong to a process, so
each run is what it would have been alone. Measurements show that it pays on a CPU (`benchmarks/README.md`). A GPU is
not measured yet: there the kernels of several processes take turns unless NVIDIA's Multi-Process Service runs them side
by side; without it a run has the GPU to itself.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastcifar.checks import check_range
from fastcifar.config import EngineConfig, RunConfig
from fastcifar.data.sources import load_dataset, resolve_auto
from fastcifar.device import free_memory, resolve_device, resolve_precision
from fastcifar.engine.memory import DataSize, Footprint, footprint, lay_out
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.many.jobs import Job, Overrides
from fastcifar.many.workers import log_of, run_jobs
from fastcifar.recipes import Recipe
from fastcifar.runs.console import Console, clock

MOST_ON_A_GPU = 8
"""Runs at a time on one GPU under NVIDIA's Multi-Process Service, whatever its memory."""


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parses `0..10` (both ends included), `0,3,7` or a mixture, in order. Raises ConfigError on errors and repeats."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\.\.(\d{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last - first >= 1000:
            raise ConfigError(f"seeds {text!r} are not known; write 0..10, which is 11 seeds, or 0,3,7.")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds {text!r} name one twice; each makes one member.")
    return tuple(seeds)


def plan_members(recipe: Recipe, seeds: Sequence[int], out: Path, overrides: Overrides) -> list[Job]:
    """Plans a run of `recipe` for each of `seeds`, in `out`/seedS; the test set is not watched.

    Raises ConfigError for one run without snapshots, or a folder with a run of another length or recipe version.
    """
    own = replace(recipe.config, watch_test=False)
    if len(seeds) < 2 and not own.schedule.snapshots:
        raise ConfigError("an ensemble takes two members or more; give more --seeds, or a recipe that keeps snapshots.")
    jobs = [Job(recipe, overrides.apply(own, seed), out / f"seed{seed}") for seed in seeds]
    for job in jobs:
        job.check_folder()
    return jobs


def train_packed(jobs: Sequence[Job], at_once: int | None, console: Console) -> None:
    """Carries out `jobs`, which differ in the seed alone, and writes the output of each to FOLDER.log.

    Finished runs are kept, interrupted ones are resumed, and one that fails does not stop the others. By default
    `how_many` decides how many run `at_once`; threads and memory are divided where they are not given. Raises
    FastcifarError where a run failed, once all others have ended, or the data set is missing; Interrupted where a
    signal stopped it, with every run saved.
    """
    check_range("at_once", at_once, 1)
    waiting = [job for job in jobs if job.result is None]
    if not waiting:
        return
    config = waiting[0].config
    at_once = min(at_once or how_many(config, fetch(config)), len(waiting))
    engine = divide(config.engine, at_once)
    waiting = [replace(job, config=replace(job.config, engine=engine)) for job in waiting]
    console.note(
        f"{len(waiting)} of {len(jobs)} members to train, {at_once} at once, {engine.threads} CPU "
        f"thread{'s' * (engine.threads != 1)} each"
    )
    start = time.perf_counter()
    failures, images = run_jobs(waiting, at_once, console)
    elapsed = time.perf_counter() - start
    console.note(
        f"{clock(elapsed)} for {len(waiting)} members, {images / elapsed:,.0f} img/s in all, starting up included"
    )
    if failures:
        folder, sentence = next(iter(failures.items()))
        count = f"{len(failures)} of {len(jobs)} members failed"
        others = " The others are done." if len(failures) < len(jobs) else ""
        raise FastcifarError(f"{count}, {folder} since {sentence.rstrip('.')}; see {log_of(folder)}.{others}")


def fetch(config: RunConfig) -> DataSize:
    """Loads the data set before several processes look for it. Raises DataError where it cannot be had."""
    data = config.data
    name = resolve_auto(data.data_dir)[0] if data.dataset == "auto" else data.dataset
    train, test = (load_dataset(name, split, data.data_dir) for split in ("train", "test"))
    return DataSize(len(train), len(test), len(train.classes), train.image_size)


def how_many(config: RunConfig, data: DataSize) -> int:
    """Returns how many runs to train at a time: `most_at_once`, or fewer where their batches would have to be split."""
    device = resolve_device(config.engine.device)
    most = most_at_once(device.type, torch.get_num_threads(), config.engine.threads, shares_the_gpu())
    free = free_memory(device)
    if free is None:
        return max(most, 1)
    precision = resolve_precision(config.engine.precision, device)
    taken = footprint(config, data, device, precision.dtype.itemsize)
    return next((count for count in range(most, 1, -1) if fits(config, taken, free // count)), 1)


def most_at_once(device: str, cpu_threads: int, threads: int | None, mps: bool) -> int:
    """Returns how many runs on a `device`, "cpu" or "cuda", gain from running side by side, whatever the memory.

    A run has `threads` threads of this machine's `cpu_threads`; by default one, which wastes nothing on waiting for
    others. `mps` says whether NVIDIA's Multi-Process Service runs.
    """
    if device == "cpu":
        return cpu_threads // (threads or 1)
    return MOST_ON_A_GPU if mps else 1


def shares_the_gpu() -> bool:
    """Tells whether NVIDIA's Multi-Process Service runs: its daemon has a pipe in a folder the environment may name."""
    return (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control").exists()


def fits(config: RunConfig, taken: Footprint, limit: int) -> bool:
    """Tells whether a run fits into `limit` bytes with its batches whole, or in the parts that it asks for."""
    try:
        plan = lay_out(config, taken, limit)
    except ConfigError:
        return False
    return plan.passes == 1 or config.engine.micro_batch is not None


def divide(engine: EngineConfig, at_once: int) -> EngineConfig:
    """Gives `engine` a share of the CPU's threads and of the free memory, where it sets none."""
    limit, free = engine.memory_limit, free_memory(resolve_device(engine.device))
    if limit is None and free is not None and at_once > 1:
        limit = f"{max(free // at_once // 2**20, 1)}MB"
    return replace(engine, threads=engine.threads or max(1, torch.get_num_threads() // at_once), memory_limit=limit)
