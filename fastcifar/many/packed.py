"""Several runs at a time on one device: which, how many, and with how many threads each; the processes are
`engine.workers`.

Processes, since each is then the run that it would have been alone: random state, threads, memory limits and compiled
code belong to a process. On a CPU that was measured to pay (`benchmarks/README.md`). On a GPU, where nothing of this is
measured yet, the kernels of several processes take turns unless NVIDIA's Multi-Process Service runs them side by side;
without it a run has the GPU to itself.
"""

from __future__ import annotations

import os
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
from fastcifar.many.reproduce import Task, check_same_reading
from fastcifar.many.workers import Pool, has_ended, log_of
from fastcifar.recipes import Recipe
from fastcifar.runs.console import Console, Silence, clock
from fastcifar.runs.folder import Run

MOST_AT_ONCE = 8
"""Runs on one GPU under NVIDIA's Multi-Process Service, whatever its memory."""


def plan_members(
    recipe: Recipe,
    seeds: Sequence[int],
    out: Path,
    *,
    epochs: int | None = None,
    val_split: int | None = None,
    data_dir: Path | None = None,
    engine: EngineConfig | None = None,
) -> list[Task]:
    """A run of `recipe` for each of `seeds`, in `out`/seedS; what is given replaces the recipe's own, and the test set
    is not watched.

    Raises:
        ConfigError: it is one run, without snapshots; or a folder holds one of another length, or of what the recipe
        used to be.
    """
    own, tasks = replace(recipe.config, watch_test=False), []
    if len(seeds) < 2 and not own.schedule.snapshots:
        raise ConfigError("an ensemble takes two members or more; give more --seeds, or a recipe that keeps snapshots.")
    for seed in seeds:
        config = replace(own, seed=seed, epochs=own.epochs if epochs is None else epochs, engine=engine or own.engine)
        split = own.data.val_split if val_split is None else val_split
        config = replace(config, data=replace(own.data, val_split=split, data_dir=data_dir or own.data.data_dir))
        task = Task(recipe, config, out / f"seed{seed}")
        check_same_reading(task, None)
        check_same_length(task)
        tasks.append(task)
    return tasks


def check_same_length(task: Task) -> None:
    """Raises ConfigError where the folder holds a run of other epochs."""
    if (task.folder / "config.json").exists():
        found = Run.open(task.folder).config().epochs
        if found != task.config.epochs:
            raise ConfigError(
                f"{task.folder} holds a run of {found} epochs in place of {task.config.epochs}; choose another --out."
            )


def train_packed(tasks: Sequence[Task], at_once: int | None = None, console: Console | None = None) -> None:
    """Trains each of `tasks` in its folder, `at_once` of them at a time, with what each of them says beside it in
    FOLDER.log.

    Runs that have ended are kept, those that were interrupted go on, and one that fails does not keep the others from
    running.

    Args:
        tasks: the runs, of one configuration but for the seed.
        at_once: how many at a time; by default as `how_many` has it. Threads and memory are divided where they are not
        given. console: where to show progress; nowhere by default.

    Raises:
        FastcifarError: a run failed, after all others were done; or the data set is missing.
        Interrupted: it was stopped by a signal, and every run was saved; the same call goes on.
    """
    check_range("at_once", at_once, 1)
    console = console or Silence()
    waiting = [task for task in tasks if not has_ended(task)]
    if not waiting:
        return
    config = waiting[0].config
    data = fetch(config)
    at_once = min(at_once or how_many(config, data), len(waiting))
    waiting = [
        replace(task, config=replace(task.config, engine=divide(task.config.engine, at_once))) for task in waiting
    ]
    threads = waiting[0].config.engine.threads
    console.note(
        f"{len(waiting)} of {len(tasks)} members to train, {at_once} at once, {threads} CPU "
        f"thread{'s' * (threads != 1)} each"
    )
    start, pool = time.perf_counter(), Pool(at_once, console)
    failures = pool.run(waiting)
    elapsed = time.perf_counter() - start
    console.note(
        f"{clock(elapsed)} for {len(waiting)} members, {pool.images / elapsed:,.0f} img/s in all, starting up included"
    )
    if failures:
        folder, sentence = next(iter(failures.items()))
        count = f"{len(failures)} of {len(tasks)} members failed"
        raise FastcifarError(
            f"{count}, {folder} since {sentence.rstrip('.')}; see {log_of(folder)}. The others are done."
        )


def fetch(config: RunConfig) -> DataSize:
    """Has the data set on disk, and checked, before several processes look for it. Raises DataError where it is not
    to be had.
    """
    data = config.data
    name = resolve_auto(data.data_dir)[0] if data.dataset == "auto" else data.dataset
    train, test = (load_dataset(name, split, data.data_dir) for split in ("train", "test"))
    return DataSize(len(train), len(test), len(train.classes), train.images.shape[1])


def how_many(config: RunConfig, data: DataSize) -> int:
    """Runs at a time: as many as gain from it (`most_at_once`), fewer where their batches would have to be split."""
    device = resolve_device(config.engine.device)
    most = most_at_once(device.type, torch.get_num_threads(), config.engine.threads, shares_the_gpu())
    free, value_bytes = free_memory(device), resolve_precision(config.engine.precision, device)[0].dtype.itemsize
    if free is None:
        return max(most, 1)
    taken = footprint(config, data, device, value_bytes)
    return next((count for count in range(most, 1, -1) if fits(config, taken, free // count)), 1)


def most_at_once(device: str, cpu_threads: int, threads: int | None, mps: bool) -> int:
    """Runs that gain from running side by side, whatever memory there is.

    Args:
        device: "cpu" or "cuda".
        cpu_threads: of this machine.
        threads: of a run, where that is given; else one, which wastes nothing on waiting for others.
        mps: whether NVIDIA's Multi-Process Service runs.
    """
    if device == "cpu":
        return cpu_threads // (threads or 1)
    return MOST_AT_ONCE if mps else 1


def shares_the_gpu() -> bool:
    """Whether NVIDIA's Multi-Process Service runs: its control daemon keeps a pipe in a folder that the environment
    may name.
    """
    return (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control").exists()


def fits(config: RunConfig, taken: Footprint, limit: int) -> bool:
    """Whether a run needs at most `limit` bytes with its batches whole, or in the parts that it asks for."""
    try:
        plan = lay_out(config, taken, limit)
    except ConfigError:
        return False
    return plan.passes == 1 or config.engine.micro_batch is not None


def divide(engine: EngineConfig, at_once: int) -> EngineConfig:
    """The share of the CPU's threads, and of the memory that is free, that one of `at_once` runs has, where none is
    given.
    """
    device, limit = resolve_device(engine.device), engine.memory_limit
    free = free_memory(device)
    if limit is None and free is not None and at_once > 1:
        limit = f"{max(free // at_once // 2**20, 1)}MB"
    return replace(engine, threads=engine.threads or max(1, torch.get_num_threads() // at_once), memory_limit=limit)
