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
"""Typical cost of compiling a network's forward and backward pass, anew and from cached artefacts (resnet20_v2, two CPU cores: 38 and
2 s)."""
CPU_OPTIONS = {"realize_reads_threshold": 8, "inplace_buffers": False}
"""Of the compiler. By default it would store a batch norm's gradient behind the ReLU, which reads more than four tensors, in float32, and
write what it computes from an activation over it, after which each iteration of the loop waits for the one before (16 channels: 1.6 ms in
place of 0.7)."""
SPEEDUP = 1.3
"""Typical gain of a compiled step over an eager one (resnet20_v2, two CPU cores: 1.35)."""


@dataclass(frozen=True)
class Compiled:
    """What came of compiling."""

    function: Callable
    """The compiled function, or the given one."""
    compiled: bool
    message: str
    """One line on the choice and its cost."""


def keep_artefacts() -> None:
    """Lets torch keep what it compiles in the user's cache, where it outlives a restart, unless the environment names a place."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))


def mark_of(config: RunConfig, device: torch.device, options: dict[str, int | bool] | None = None) -> Path:
    """A file that exists once the step of `config` has been compiled for `device`, by this torch with these options, into the cache."""
    size = config.engine.micro_batch or config.batch_size
    made_of = asdict(config.model), asdict(config.loss), size, config.engine.precision
    parts = (*made_of, torch.__version__, device_name(device), options)
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", cache_folder() / "compiled")) / "fastcifar" / name


def compile_where_it_pays(
    function: Callable,
    requested: str,
    rehearse: Callable[[Callable], None],
    steps: int,
    mark: Path | None = None,
    options: dict[str, int | bool] | None = None,
    announce: Callable[[], None] = lambda: None,
) -> Compiled:
    """`function`, compiled if `requested` is "on", or "auto" and the time saved over `steps` exceeds the time of compiling.

    Args:
        function: the forward pass with its loss.
        requested: "auto", "on" or "off".
        rehearse: runs one forward and backward pass through the function it is given, and leaves no trace of it.
        steps: steps still to run.
        mark: file that tells whether the same was compiled before, and is made where it was not.
        options: of the compiler.
        announce: called before the compiler starts.
    """
    if not steps:
        return Compiled(function, requested == "on", "Not compiled: no step is left to run.")
    if requested == "off":
        return Compiled(function, False, "Not compiled, as asked.")
    if requested == "auto":
        rehearse(function)
        eager = steps * min(timed(rehearse, function) for _ in range(3))
        cost = WARM_SECONDS if mark and mark.exists() else COLD_SECONDS
        if eager * (1 - 1 / SPEEDUP) < cost:
            return Compiled(function, False, f"Not compiled: {eager:.0f} s of training would not win back the {cost:.0f} s.")
    announce()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    compiled = torch.compile(function, dynamic=False, options=options)
    try:
        seconds = timed(rehearse, compiled)
    except Exception as error:
        torch.compiler.reset()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Compiled(function, False, f"Not compiled: torch.compile failed ({reason[:160]}); training goes on without it.")
    if mark:
        with suppress(OSError):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    return Compiled(compiled, True, f"Compiled in {seconds:.1f} s.")


def timed(call: Callable, *arguments: object) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start
