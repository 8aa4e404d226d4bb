"""The seam to the compiler: decides whether compiling pays, compiles, and falls back."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastcifar.config import RunConfig
from fastcifar.data.sources import cache_folder
from fastcifar.engine.host import device_name

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
