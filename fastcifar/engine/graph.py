"""The seam to the compiler: decides whether compiling pays, compiles, and falls back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

COMPILE_SECONDS = 40.0
"""Typical cost of compiling a network's forward and backward pass (resnet20_v2, two CPU cores: 38 s; with cached artefacts 2 s)."""
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


def compile_where_it_pays(function: Callable, requested: str, rehearse: Callable[[Callable], None], steps: int) -> Compiled:
    """`function`, compiled if `requested` is "on", or "auto" and the time saved over `steps` exceeds the time of compiling.

    Args:
        function: the forward pass with its loss.
        requested: "auto", "on" or "off".
        rehearse: runs one forward and backward pass through the function it is given, and leaves no trace of it.
        steps: steps still to run.
    """
    if not steps:
        return Compiled(function, requested == "on", "Not compiled: no step is left to run.")
    if requested == "off":
        return Compiled(function, False, "Not compiled, as asked.")
    if requested == "auto":
        rehearse(function)
        eager = steps * min(timed(rehearse, function) for _ in range(3))
        if eager * (1 - 1 / SPEEDUP) < COMPILE_SECONDS:
            return Compiled(function, False, f"Not compiled: {eager:.0f} s of training would not win back the {COMPILE_SECONDS:.0f} s.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    compiled = torch.compile(function, dynamic=False)
    try:
        seconds = timed(rehearse, compiled)
    except Exception as error:
        torch.compiler.reset()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Compiled(function, False, f"Not compiled: torch.compile failed ({reason[:160]}); training goes on without it.")
    return Compiled(compiled, True, f"Compiled in {seconds:.1f} s.")


def timed(call: Callable, *arguments: object) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start
