"""What makes a step fast: compiling its forward and backward pass, where that pays, and capturing it as CUDA graphs."""

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
"""Typical cost of compiling a network's forward and backward pass, anew and from cached artefacts (resnet20_v2, two CPU
cores: 38 and 2 s)."""
OPTIONS = {"cpu": {"realize_reads_threshold": 8, "inplace_buffers": False}, "cuda": None}
"""Options of the compiler. On a CPU it would store a batch norm's gradient behind the ReLU, which reads more than four
tensors, in float32, and write what it computes from an activation over it, after which each iteration of the loop waits
for the one before (16 channels: 1.6 ms in place of 0.7)."""
SPEEDUP = {"cpu": 1.3, "cuda": 1.05}
"""Typical gain of a compiled step over an eager one. resnet20_v2 gains 1.35 on two CPU cores. On a GPU our own kernels
leave the compiler 13 of 174 launches, and a captured step does not wait for the host; no card has shown yet what that
comes to."""
WARM_UP_STEPS = 3
"""Run before a capture, so that libraries have chosen their algorithms and made their workspaces."""


class Why(Enum):
    """Why a step is not compiled, or not captured."""

    ASKED = auto()
    NO_STEP_LEFT = auto()
    DOES_NOT_PAY = auto()
    SHORT_RUN = auto()
    """The run is shorter than the warm-up of a capture."""
    OVERFLOW_CHECK = auto()
    """The optimizer waits in the middle of a step to know whether a float16 gradient overflowed."""
    FAILED = auto()


@dataclass(frozen=True)
class Obstacle:
    """What keeps a step from being compiled, or captured."""

    why: Why
    detail: str = ""
    """Of a failure the error's reason; of an overflow check the optimizer's class."""
    training_seconds: float = 0.0
    """The time of the steps to come, where compiling does not pay."""
    compile_seconds: float = 0.0
    """The time that compiling would take."""


def keep_artefacts() -> None:
    """Lets torch keep what it compiles in the user's cache, where it outlives a restart, unless the environment
    names a place.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))


def mark_of(config: RunConfig, device: torch.device) -> Path:
    """A file that exists once the step of `config` has been compiled for `device`, by this torch, into the cache."""
    size = config.engine.micro_batch or config.batch_size
    made_of = asdict(config.model), asdict(config.loss), size, config.engine.precision
    parts = (*made_of, torch.__version__, device_name(device), OPTIONS[device.type])
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", cache_folder() / "compiled")) / "fastcifar" / name


def obstacle_to_compiling(
    requested: str, steps: int, step_seconds: Callable[[], float], device: str, cached: bool
) -> Obstacle | None:
    """Why a run with so many `steps` to come is not to be compiled; with "auto" it is where the time saved exceeds that
    of compiling.

    `step_seconds` measures an eager step, as the run would launch it; `cached` says whether the same was compiled
    before, and its artefacts are kept.
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
    """`function` compiled for a `device`, "cpu" or "cuda", or why that failed; where it succeeds `mark` is made.

    `rehearse` runs a forward and backward pass through the function it is given. Raises torch.AcceleratorError where
    CUDA itself failed.
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
    """Seconds that a call takes."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def obstacle_to_capture(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, total_steps: int
) -> Obstacle | None:
    """Why a step of a run of `total_steps` is not to be captured, as far as is known without trying."""
    if total_steps < WARM_UP_STEPS:
        return Obstacle(Why.SHORT_RUN)
    if scaler.is_enabled() and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return Obstacle(Why.OVERFLOW_CHECK, type(optimizer).__name__)
    return None


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
    besides its batch must stay where it is in memory, and the step must count itself. Shapes and types are taken from
    a batch: `images` (B, 3, H, W) in channels_last, and `labels`.
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
