"""fastcifar against three plain loops (`comparison.py`), in one run: each row's time is that of an epoch."""

from __future__ import annotations

import gc
from itertools import accumulate
from statistics import median
from typing import Any

import pytest
import torch
from comparison import LOOPS, Task, task_for
from timing import seconds

from fastcifar.device import Precision, matmul_flops_per_second
from fastcifar.models.count import count_network

TARGET = 0.9
"""The test accuracy that the loops are timed to."""
rates: dict[str, float] = {}
"""The images a second of the loops run so far."""


@pytest.fixture
def task(request, device) -> Task:
    small = request.config.getoption("dry_run", False)
    return task_for(device.type, 10 if small else 128, smoke=small)


@pytest.mark.takes(60)
@pytest.mark.benchmark(group="comparison")
@pytest.mark.parametrize("name", LOOPS)
def test_loop(benchmark, task, name):
    """Times epochs without compiling, capturing and evaluating, for which the clock stands still."""
    gc.collect()
    torch.compiler.reset()
    loop, accuracies = LOOPS[name](task), []
    benchmark.extra_info.update(setup_seconds=seconds(loop.prepare, task.device))
    benchmark.pedantic(
        loop.epoch, teardown=lambda: accuracies.append(loop.accuracy()), rounds=task.config.epochs, iterations=1
    )
    found = figures(task, name, benchmark.stats.stats.data, accuracies)
    rates[name] = found["images_per_second"]
    benchmark.extra_info.update(found)


def figures(task: Task, name: str, times: list[float], accuracies: list[float]) -> dict[str, Any]:
    config = task.config
    precision = "fp32" if name == "reports" else config.engine.precision
    images = len(task.train) // config.batch_size * config.batch_size
    rate = images / median(times)
    flops = count_network(config.model.arch, **config.model.options).training_flops
    reached = [sofar for sofar, accuracy in zip(accumulate(times), accuracies, strict=True) if accuracy >= TARGET]
    return {
        "network": config.model.arch,
        "batch_size": config.batch_size,
        "dataset": config.data.dataset,
        "precision": precision,
        "images_per_second": rate,
        "flop_utilization": rate * flops / matmul_flops_per_second(task.device, Precision(precision).dtype),
        **{f"times_{other}": rate / other_rate for other, other_rate in rates.items()},
        "accuracies": accuracies,
        "seconds_to_target": reached[0] if reached else None,
    }
