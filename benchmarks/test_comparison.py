"""fastcifar against three plain loops (`comparison.py`), in one run: each row's time is that of an epoch, and it
holds the accuracies.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest
from comparison import LOOPS, Outcome, Race, Task, task_for

outcomes: list[Outcome] = []


@pytest.fixture
def task(request, device) -> Task:
    return task_for(device.type, *([10] if (small := request.config.getoption("dry_run", False)) else []), smoke=small)


@pytest.mark.takes(60)
@pytest.mark.benchmark(group="comparison")
@pytest.mark.parametrize("loop", LOOPS)
def test_loop(benchmark, task, loop):
    race = Race(loop, task)
    benchmark.pedantic(race.epoch, teardown=race.look, rounds=task.config.epochs)
    outcomes.append(race.outcome(benchmark.stats.stats.data, outcomes))
    benchmark.extra_info.update(asdict(outcomes[-1]))
