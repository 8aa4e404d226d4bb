"""Every op against its rival, made from its `OpSpec`: the forward, and the backward timed apart from it.

On a GPU the calls are replayed from a CUDA graph, so that launching costs what it does in a captured training step, and
each has arguments of its own, together larger than the second-level cache. On a CPU only each op's first network case
is timed, at its first dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from op_specs import SPECS, Arguments, Case, OpSpec
from timing import seconds
from torch import Tensor

from fastcifar.device import resolve_device

ROUNDS = 5
CACHE_BYTES = 256 << 20
"""Larger than the second-level cache of any card."""

MOST_CALLS = 64
"""The most calls in one captured graph."""

ON_A_GPU = resolve_device("auto").type == "cuda"

Call = Callable[[], object]


def forward(spec: OpSpec, function: Callable[..., Any], arguments: Arguments) -> Call:
    """Returns a call of the function, for inputs that require gradients where the op has them."""
    for leaf in differentiable(spec, arguments):
        leaf.requires_grad_()
    return lambda: function(**arguments)


def backward(spec: OpSpec, function: Callable[..., Any], arguments: Arguments) -> Call:
    """Returns a call of the backward alone, to be made once; the forward has been run."""
    returned = [
        result for result in spec.results(arguments, forward(spec, function, arguments)()) if result.requires_grad
    ]
    gradients = [torch.randn_like(result) for result in returned]
    return lambda: torch.autograd.grad(returned, differentiable(spec, arguments), gradients)


def differentiable(spec: OpSpec, arguments: Arguments) -> list[Tensor]:
    return [arguments[name] for name in spec.differentiable if arguments[name] is not None]


DIRECTIONS = {"forward": forward, "backward": backward}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes a test for each spec, network case, dtype and direction; small cases in a dry run."""
    small = metafunc.config.getoption("dry_run", False)
    rows = [
        pytest.param(
            spec, case, dtype, direction, id=f"{spec.name}-{case.name}-{str(dtype).removeprefix('torch.')}-{direction}"
        )
        for spec in SPECS
        for case in (spec.small_cases() if small else spec.network_cases())[: None if ON_A_GPU else 1]
        for dtype in spec.dtypes[: None if ON_A_GPU else 1]
        for direction in (DIRECTIONS if spec.differentiable else ["forward"])
    ]
    metafunc.parametrize(("spec", "case", "dtype", "direction"), rows)


@contextmanager
def rounds_of(
    prepare: Callable[[], Call], device: torch.device, moved: int
) -> Iterator[tuple[Callable[[], Call], int]]:
    """Yields what prepares a round's call, and how many calls a round holds: on a GPU as many as outgrow the cache."""

    def replay() -> None:
        with torch.cuda.stream(stream):  # whose memory it uses
            graph.replay()

    if device.type != "cuda":
        yield prepare, 1
        return
    count = min(MOST_CALLS, math.ceil(CACHE_BYTES / moved))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    # A backward runs on the stream of its forward, which must therefore be the one that is captured.
    with torch.cuda.stream(stream):
        prepare()()
        calls = [prepare() for _ in range(count)]
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    yield lambda: replay, count


def time_of(prepare: Callable[[], Call], device: torch.device, moved: int) -> float:
    """Returns seconds a call, the median of `ROUNDS` after one to warm up."""
    with rounds_of(prepare, device, moved) as (fresh, count):
        return median([seconds(fresh(), device) for _ in range(1 + ROUNDS)][1:]) / count


@pytest.mark.takes(15)
@pytest.mark.benchmark(group="kernels")
def test_op(benchmark, device, copy_bandwidth, spec: OpSpec, case: Case, dtype: torch.dtype, direction: str) -> None:
    moved = spec.bytes_moved(spec.make(case.shape, dtype, device))

    def prepare(function: Callable[..., Any]) -> Call:
        return DIRECTIONS[direction](spec, function, spec.make(case.shape, dtype, device))

    with rounds_of(partial(prepare, spec.op), device, moved) as (fresh, count):
        benchmark.pedantic(
            lambda call: seconds(call, device),
            setup=lambda: ((fresh(),), {}),
            rounds=ROUNDS,
            iterations=1,
            warmup_rounds=1,
        )
    own = benchmark.stats.stats.median / count
    rivals = {"rival": spec.rival}
    if device.type == "cuda":
        torch.compiler.reset()
        rivals["compiled_rival"] = torch.compile(spec.rival)
    ratios = {f"times_{name}": time_of(partial(prepare, rival), device, moved) / own for name, rival in rivals.items()}
    benchmark.extra_info.update(seconds=own, **ratios)
    # The bytes a spec counts are those of the forward.
    if direction == "forward":
        benchmark.extra_info.update(
            bytes_moved=moved, bytes_per_second=moved / own, share_of_copy_bandwidth=moved / own / copy_bandwidth
        )
