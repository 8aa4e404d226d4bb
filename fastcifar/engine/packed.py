"""Several runs at a time on one device: which, how many, and with how many threads each; the processes are `engine.workers`."""

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
from fastcifar.engine.host import resolve_device
from fastcifar.engine.reproduce import Task, check_same_reading
from fastcifar.engine.workers import Pool, has_ended, log_of
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.models.count import count_network
from fastcifar.recipes import Recipe
from fastcifar.runs.console import Console, Silence, clock
from fastcifar.runs.folder import Run

MOST_AT_ONCE = 8
"""Runs on one GPU, whatever its memory."""
MEMORY_SHARE = 0.8
"""Of what is free, for the runs."""
PROCESS_BYTES = 1 << 30
"""Beside its tensors, for what a process holds of libraries, and of a GPU's context and workspaces."""


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
    """A run of `recipe` for each of `seeds`, in `out`/seedS; what is given replaces the recipe's own.

    Raises:
        ConfigError: a folder holds a run of another length, or of what the recipe used to be.
    """
    own, tasks = recipe.config, []
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
            raise ConfigError(f"{task.folder} holds a run of {found} epochs in place of {task.config.epochs}; choose another --out.")


def train_packed(tasks: Sequence[Task], at_once: int | None = None, console: Console | None = None) -> None:
    """Trains each of `tasks` in its folder, `at_once` of them at a time, with the output of each beside it in FOLDER.log.

    Runs that have ended are kept, those that were interrupted go on, and one that fails does not keep the others from running.

    Args:
        tasks: the runs.
        at_once: how many at a time; by default as `how_many` has it. Where threads are not given, they share the CPU's.
        console: where to show progress; nowhere by default.

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
    fetch(config)
    at_once = min(at_once or how_many(config), len(waiting))
    threads = config.engine.threads or max(1, torch.get_num_threads() // at_once)
    console.note(f"{len(waiting)} of {len(tasks)} members to train, {at_once} at once, {threads} CPU threads each")
    start, pool = time.perf_counter(), Pool(at_once, threads, console)
    failures = pool.run(waiting)
    elapsed = time.perf_counter() - start
    console.note(f"{clock(elapsed)} for {len(waiting)} members, {pool.images / elapsed:,.0f} img/s in all, starting up included")
    if failures:
        folder, sentence = next(iter(failures.items()))
        count = f"{len(failures)} of {len(tasks)} members failed"
        raise FastcifarError(f"{count}, {folder} since {sentence.rstrip('.')}; see {log_of(folder)}. The others are done.")


def fetch(config: RunConfig) -> None:
    """Has the data set on disk, and checked, before several processes look for it. Raises DataError where it is not to be had."""
    data = config.data
    name = resolve_auto(data.data_dir)[0] if data.dataset == "auto" else data.dataset
    for split in ("train", "test"):
        load_dataset(name, split, data.data_dir)


def how_many(config: RunConfig) -> int:
    """Runs at a time: on a CPU one for each of its threads, on a GPU `MOST_AT_ONCE`, as far as the memory that is free allows."""
    device = resolve_device(config.engine.device)
    most = torch.get_num_threads() if device.type == "cpu" else MOST_AT_ONCE
    return max(1, min(most, int(MEMORY_SHARE * free_bytes(device) / run_bytes(config))))


def free_bytes(device: torch.device) -> float:
    """Memory that is free on `device`; infinite where the system does not say it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def run_bytes(config: RunConfig) -> int:
    """What a run takes at most, roughly: weights and their companions in float32, the activations of a batch, the images of CIFAR."""
    options = {"image_size": 32, **config.model.options}
    count, average = count_network(config.model.arch, **options), config.average
    averages = len(average.decays) + (average.swa_start is not None)
    best = (1 + averages) * bool(config.data.val_split)
    copies = 2 + 2 + averages + best + (config.optim.sharpness != "none")  # weights, gradients, two moments
    images = 60_000 * 3 * options["image_size"] ** 2
    return 4 * copies * count.parameters + config.batch_size * count.activation_bytes + images + PROCESS_BYTES
