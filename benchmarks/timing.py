"""How a figure is measured.

Every figure is images (or bytes) a second of work that has finished, compiling and warming up left out; speeds are
compared as ratios within one run, since machines differ and are noisy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from fastcifar.device import synchronize


@contextmanager
def one_core() -> Iterator[None]:
    """Keeps everything within on one CPU core, whatever threads it starts, so that figures are per core."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system cannot bind a process to one core")
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def measure(benchmark, call: Callable[[], object], device: torch.device, *, rounds: int = 5) -> float:
    """Times `call` `rounds` times after one warm-up; returns the median in seconds."""

    def finished() -> None:
        call()
        synchronize(device)

    benchmark.pedantic(finished, rounds=rounds, warmup_rounds=1)
    return benchmark.stats.stats.median
