"""What several runs on one device train together: as processes, as `fastcifar ensemble` has them, and on streams of one process."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from fastcifar.config import RunConfig
from fastcifar.engine.host import synchronize
from fastcifar.engine.packed import divide
from fastcifar.engine.resolve import resolve
from fastcifar.engine.run import prepare_machine
from fastcifar.engine.trainer import Trainer
from suite.measures import config_of, images_for
from suite.records import PackedSpeed, PartlyFailed, Settings

COUNTS = (1, 2, 4, 8)
WARM_UP_SECONDS, SECONDS, SMOKE_SECONDS = 3.0, 10.0, 0.2
PATIENCE = 400.0
"""Seconds that the first to be ready waits for the last."""
EPOCHS = 1000
"""More than anything trains while the clock runs."""
meeting: threading.Barrier
"""Where a process waits for the others, so that all train at the same time."""


def packed(item: str, settings: Settings, folder: Path) -> list[PackedSpeed]:
    """A network and a way to train several, such as `resnet20_v2 processes`, one run first. Raises PartlyFailed with what was measured."""
    (network, way), rows = item.split(), []
    try:
        for count in counts(settings):
            config = replace(config_of(network, 32 if settings.smoke else 128, settings), epochs=EPOCHS)
            shares = WAYS[way](config, count, settings)
            total = sum(rate for rate, _ in shares)
            captured, threads = all(captured for _, captured in shares), divide(config.engine, count).threads
            one = rows[0].images_per_second if rows else total
            rows.append(PackedSpeed(network, config.batch_size, way, count, threads, captured, served(), total, total / one))
    except Exception as error:
        raise PartlyFailed(rows, f"{count} at once: {type(error).__name__}: {error}") from error
    return rows


def counts(settings: Settings) -> list[int]:
    """Runs at a time; on a CPU no more than there are threads."""
    if settings.smoke:
        return [1, 2]
    return [count for count in COUNTS if settings.device == "cuda" or count <= torch.get_num_threads()]


def served() -> bool:
    """Whether NVIDIA's Multi-Process Service is there, without which the kernels of several processes take turns."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()


Share = tuple[float, bool]
"""Images a second of one of the runs, and whether its steps are CUDA graphs."""


def by_processes(config: RunConfig, count: int, settings: Settings) -> list[Share]:
    """Each with its share of threads and memory."""
    config = replace(config, engine=divide(config.engine, count))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=meet_at, initargs=(context.Barrier(count),)) as pool:
        return results([pool.submit(one_process, config, settings) for _ in range(count)])


def meet_at(barrier: threading.Barrier) -> None:
    global meeting
    meeting = barrier


def one_process(config: RunConfig, settings: Settings) -> Share:
    with breaking(meeting):
        trainer = prepared(config, settings)
        return timed_with_others(trainer, meeting, settings)


def by_streams(config: RunConfig, count: int, settings: Settings) -> list[Share]:
    """Each in a thread, whose work goes to a stream of its own; on a CPU, where there are none, in a thread."""
    torch.compiler.reset()  # compiling the same code too often is refused
    trainers, barrier = [prepared(config, settings) for _ in range(count)], threading.Barrier(count)

    def train(trainer: Trainer) -> Share:
        stream = torch.cuda.Stream(trainer.device) if trainer.device.type == "cuda" else None
        with breaking(barrier), torch.cuda.stream(stream):
            return timed_with_others(trainer, barrier, settings)

    with ThreadPoolExecutor(count) as pool:
        return results([pool.submit(train, trainer) for trainer in trainers])


WAYS: dict[str, Callable[[RunConfig, int, Settings], list[Share]]] = {"processes": by_processes, "streams": by_streams}


@contextmanager
def breaking(barrier: threading.Barrier):
    """Does not let the others wait for one that failed."""
    try:
        yield
    except BaseException:
        barrier.abort()
        raise


def results(futures: list[Future]) -> list[Share]:
    """What all came to. Raises the error of the one that failed, not of those that waited for it."""
    errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    return [future.result() for future in futures]


def prepared(config: RunConfig, settings: Settings) -> Trainer:
    """Compiled, captured, and warm."""
    config, _ = resolve(config)
    prepare_machine(config.engine)
    trainer = Trainer(config, images_for(settings))
    print(trainer.compile(), trainer.capture())
    train_for(trainer, SMOKE_SECONDS if settings.smoke else WARM_UP_SECONDS)
    return trainer


def timed_with_others(trainer: Trainer, barrier: threading.Barrier, settings: Settings) -> Share:
    barrier.wait(PATIENCE)
    rate = train_for(trainer, SMOKE_SECONDS if settings.smoke else SECONDS)
    return rate, trainer.config.engine.capture == "on"


def train_for(trainer: Trainer, seconds: float) -> float:
    """Trains for so long; returns images a second, by the time at which the device has done them."""
    start, first = time.perf_counter(), trainer.steps_done

    def over() -> bool:
        return time.perf_counter() - start >= seconds

    while not over():
        trainer.run_epoch(over, tick=lambda batch: None)
    synchronize(trainer.device)
    return (trainer.steps_done - first) * trainer.config.batch_size / (time.perf_counter() - start)
