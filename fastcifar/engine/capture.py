"""Steps of training as CUDA graphs: the host copies batches into place and launches one graph, whatever a step
consists of.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastcifar.engine.step import Step, Workspace

WARM_UP_STEPS = 3
"""Run before a capture, so that libraries have chosen their algorithms and made their workspaces."""

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Records what a call launches, without its taking effect, and returns what launches the same again."""


class Recorder:
    """Records CUDA graphs, all of them on one stream and out of one pool of memory.

    Graphs that are replayed in turn, never side by side, can share a pool: none needs what another left there.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, call: Callable[[], None]) -> None:
        """Calls a few times, as PyTorch asks for before a capture; the caller undoes the effects. Raises RuntimeError
        where the last waits.

        In a capture a wait would be an error of CUDA's, after which torch 2.11 leaves its allocator as if the capture
        went on.
        """
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP_STEPS - 1):
                    call()
                with refusing_to_wait():
                    call()
        finally:
            current.wait_stream(self.stream)

    def __call__(self, call: Callable[[], None]) -> Replay:
        """Captures `call`, which runs nothing; a loader's own threads may use the GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            call()
        return graph.replay


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Within the block whatever would make the host wait for the GPU raises RuntimeError, where torch notices."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*debug mode is a prototype.*")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class CapturedSteps:
    """`step`, recorded once for a single batch and once for `count` batches in a row.

    Batches are collected until `count` are there; `flush` runs the fewer that remain. What the step reads and writes
    besides its batch must stay where it is in memory, and the step must count itself.

    Args:
        step: a whole step.
        images, labels: a batch to take shapes and types from; images (B, 3, H, W) in channels_last.
        count: steps in a row.
        record: how to record; a `Recorder` but for tests.
    """

    def __init__(self, step: Step, images: Tensor, labels: Tensor, count: int, record: Record) -> None:
        rows = images.permute(0, 2, 3, 1)
        self.images = torch.zeros((count, *rows.shape), dtype=rows.dtype, device=rows.device).permute(0, 1, 4, 2, 3)
        self.labels = torch.zeros((count, *labels.shape), dtype=labels.dtype, device=labels.device)
        self.count, self.filled = count, 0

        def steps(slots: int) -> None:
            for slot in range(slots):
                step(Workspace(None, self.images[slot], self.labels[slot]))

        self.one = record(lambda: steps(1))
        self.all = record(lambda: steps(count)) if count > 1 else self.one

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Takes in a batch; runs all of them once there are `count`."""
        self.images[self.filled].copy_(images, non_blocking=True)
        self.labels[self.filled].copy_(labels, non_blocking=True)
        self.filled += 1
        if self.filled == self.count:
            self.all()
            self.filled = 0

    def flush(self) -> None:
        """Runs the batches that wait."""
        for slot in range(self.filled):
            if slot:
                self.images[0].copy_(self.images[slot])
                self.labels[0].copy_(self.labels[slot])
            self.one()
        self.filled = 0


def capture_obstacle(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps: int) -> str | None:
    """Why a step with these, of a run of so many, cannot be recorded: mostly what waits for the device in its
    middle.
    """
    if steps < WARM_UP_STEPS:
        return "since the run is shorter than the warm-up"
    if scaler.is_enabled() and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return f"since {type(optimizer).__name__} in float16 waits to know whether the gradient overflowed"
    return None
