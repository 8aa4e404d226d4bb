"""Speeds up a step: compiles its forward and backward pass where that pays, and captures it as CUDA graphs."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import Enum, auto
from pathlib import Path

import torch
from torch import Tensor

from fastcifar.config import RunConfig
from fastcifar.data.sources import cache_folder
from fastcifar.device import device_name
from fastcifar.engine.step import Step, Workspace
from fastcifar.errors import reason

COLD_SECONDS, WARM_SECONDS = 40.0, 4.0
"""Typical seconds of compiling anew and from cached artefacts (resnet20_v2 on two CPU cores: 38 and 2)."""
OPTIONS = {"cpu": {"realize_reads_threshold": 8, "inplace_buffers": False}, "cuda": None}
"""Compiler options, which on a CPU keep it from storing a batch norm's gradient behind the ReLU in float32.

By default it does so, as that gradient reads more than four tensors, and it overwrites an activation with what it
computes from it, after which each loop iteration waits for the one before (16 channels: 1.6 ms in place of 0.7).
"""
SPEEDUP = {"cpu": 1.3, "cuda": 1.05}
"""Typical speed-up of a compiled step over an eager one.

resnet20_v2 gains 1.35 on two CPU cores. On a GPU our own kernels leave the compiler 13 of 174 launches, and a captured
step does not wait for the host; the gain there has not been measured.
"""
WARM_UP_STEPS = 3
"""Steps run before a capture, so that libraries choose their algorithms and allocate their workspaces."""


class Why(Enum):
    ASKED = auto()
    NO_STEP_LEFT = auto()
    DOES_NOT_PAY = auto()
    SHORT_RUN = auto()
    """The run is shorter than a capture's warm-up."""
    OVERFLOW_CHECK = auto()
    """The optimizer waits within a step to learn whether a float16 gradient overflowed."""
    FAILED = auto()


@dataclass(frozen=True)
class Obstacle:
    why: Why
    detail: str = ""
    """The error's reason for a failure; the optimizer's class for an overflow check."""
    training_seconds: float = 0.0
    """Time of the remaining steps, where compiling does not pay."""
    compile_seconds: float = 0.0


def keep_artefacts() -> None:
    """Makes torch keep compiled code in the user's cache, unless the environment names a place."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))


def mark_of(config: RunConfig, device: torch.device) -> Path:
    """Returns the path of a marker file: this torch has compiled `config`'s step for `device` into the cache."""
    size = config.engine.micro_batch or config.batch_size
    made_of = asdict(config.model), asdict(config.loss), size, config.engine.precision
    parts = (*made_of, torch.__version__, device_name(device), OPTIONS[device.type])
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", cache_folder() / "compiled")) / "fastcifar" / name


def obstacle_to_compiling(
    requested: str, steps: int, step_seconds: Callable[[], float], device: str, cached: bool
) -> Obstacle | None:
    """Returns why a run with `steps` to come should not be compiled; "auto" compiles where that saves time overall.

    `step_seconds` measures an eager step, as launched; `cached` says whether compiled artefacts are kept from before.
    """
    if not steps:
        return Obstacle(Why.NO_STEP_LEFT)
    if requested == "off":
        return Obstacle(Why.ASKED)
    if requested == "on":
        return None
    eager, cost = steps * step_seconds(), WARM_SECONDS if cached else COLD_SECONDS
    if eager * (1 - 1 / SPEEDUP[device]) >= cost:
        return None
    return Obstacle(Why.DOES_NOT_PAY, training_seconds=eager, compile_seconds=cost)


def compile_function(
    function: Callable, device: str, rehearse: Callable[[Callable], None], mark: Path
) -> Callable | Obstacle:
    """Compiles `function` for a `device`, "cpu" or "cuda", and creates `mark`; returns an obstacle where that fails.

    `rehearse` runs a forward and backward pass through a function. Raises AcceleratorError where CUDA itself failed.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    compiled = torch.compile(function, dynamic=False, options=OPTIONS[device])
    try:
        rehearse(compiled)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        torch.compiler.reset()
        return Obstacle(Why.FAILED, reason(error))
    with suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return compiled


def timed(call: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def obstacle_to_capture(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, total_steps: int
) -> Obstacle | None:
    """Returns why a step in a run of `total_steps` cannot be captured, as far as is known without trying."""
    if total_steps < WARM_UP_STEPS:
        return Obstacle(Why.SHORT_RUN)
    if scaler.is_enabled() and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return Obstacle(Why.OVERFLOW_CHECK, type(optimizer).__name__)
    return None


Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Records what a call launches, without running it, and returns a function that launches the same again."""


class Recorder:
    """Records CUDA graphs on one stream; they share a memory pool, since they are replayed in turn, never at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, call: Callable[[], None]) -> None:
        """Calls `call` a few times, as PyTorch requires before a capture; the caller undoes the effects.

        Raises RuntimeError where the last call waits for the GPU: in a capture that would be a CUDA error, after which
        torch 2.11 leaves its allocator as if the capture went on.
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
        """Captures `call` without running it; a loader's own threads may use the GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            call()
        return graph.replay


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Raises RuntimeError for whatever makes the host wait for the GPU within the block, where torch notices."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*debug mode is a prototype.*")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class CapturedSteps:
    """Records `step` once for a single batch and once for `count` batches in a row.

    Batches are collected until there are `count`; `flush` runs fewer. What the step reads and writes besides its batch
    must keep its place in memory, and the step must count itself. Shapes and dtypes are those of `images` (B, 3, H, W),
    in channels_last, and `labels`.
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
        """Adds a batch; runs all of them once there are `count`."""
        self.images[self.filled].copy_(images, non_blocking=True)
        self.labels[self.filled].copy_(labels, non_blocking=True)
        self.filled += 1
        if self.filled == self.count:
            self.all()
            self.filled = 0

    def flush(self) -> None:
        for slot in range(self.filled):
            if slot:
                self.images[0].copy_(self.images[slot])
                self.labels[0].copy_(self.labels[slot])
            self.one()
        self.filled = 0
