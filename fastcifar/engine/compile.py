"""The step compiled, where that pays, and captured as CUDA graphs, where there is a GPU."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastcifar.config import RunConfig
from fastcifar.data.sources import cache_folder
from fastcifar.device import device_name
from fastcifar.engine.step import Step, Workspace

COLD_SECONDS, WARM_SECONDS = 40.0, 4.0
"""Typical cost of compiling a network's forward and backward pass, anew and from cached artefacts (resnet20_v2, two CPU
cores: 38 and 2 s)."""
CPU_OPTIONS = {"realize_reads_threshold": 8, "inplace_buffers": False}
"""Options of the compiler. By default it would store a batch norm's gradient behind the ReLU, which reads more than
four tensors, in float32, and write what it computes from an activation over it, after which each iteration of the loop
waits for the one before (16 channels: 1.6 ms in place of 0.7)."""
SPEEDUP = {"cpu": 1.3, "cuda": 1.05}
"""Typical gain of a compiled step over an eager one. resnet20_v2 gains 1.35 on two CPU cores. On a GPU our own kernels
leave the compiler 13 of 174 launches, and a captured step does not wait for the host; no card has shown yet what that
comes to."""


@dataclass(frozen=True)
class Compiled:
    """What came of compiling."""

    function: Callable
    """The compiled function, or the given one."""
    compiled: bool
    message: str
    """One line on the choice and its cost."""


def keep_artefacts() -> None:
    """Lets torch keep what it compiles in the user's cache, where it outlives a restart, unless the environment
    names a place.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))


def mark_of(config: RunConfig, device: torch.device, options: dict[str, int | bool] | None = None) -> Path:
    """A file that exists once the step of `config` has been compiled for `device`, by this torch with these options,
    into the cache.
    """
    size = config.engine.micro_batch or config.batch_size
    made_of = asdict(config.model), asdict(config.loss), size, config.engine.precision
    parts = (*made_of, torch.__version__, device_name(device), options)
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", cache_folder() / "compiled")) / "fastcifar" / name


def obstacle_to_compiling(
    requested: str, steps: int, step_seconds: Callable[[], float], device: str, cached: bool
) -> str | None:
    """A line on why a run is not compiled, or None where it is: as asked, or for "auto" since the time saved exceeds
    that of compiling.

    Args:
        requested: "auto", "on" or "off".
        steps: those still to run.
        step_seconds: measures an eager step, as the run would launch it.
        device: "cpu" or "cuda".
        cached: whether the same was compiled before, and its artefacts are kept.
    """
    if not steps:
        return "Not compiled: no step is left to run."
    if requested == "off":
        return "Not compiled, as asked."
    if requested == "on":
        return None
    eager, cost = steps * step_seconds(), WARM_SECONDS if cached else COLD_SECONDS
    if eager * (1 - 1 / SPEEDUP[device]) >= cost:
        return None
    return f"Not compiled: {eager:.0f} s of training would not win back the {cost:.0f} s."


def compile_function(
    function: Callable, rehearse: Callable[[Callable], None], mark: Path, options: dict[str, int | bool] | None
) -> Compiled:
    """`function` compiled, or itself where that fails.

    Args:
        function: the forward pass with its loss.
        rehearse: runs one forward and backward pass through the function it is given, and leaves no trace of it.
        mark: file that is made where it succeeds.
        options: of the compiler.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    compiled = torch.compile(function, dynamic=False, options=options)
    try:
        seconds = timed(rehearse, compiled)
    except Exception as error:
        torch.compiler.reset()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Compiled(
            function, False, f"Not compiled: torch.compile failed ({reason[:160]}); training goes on without it."
        )
    with suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return Compiled(compiled, True, f"Compiled in {seconds:.1f} s.")


def timed(call: Callable, *arguments: object) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


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
