"""Decides where an op runs: as its Triton kernel, or as its reference in plain torch.

`FASTCIFAR_KERNELS=reference` switches all kernels off. It is read once, at import, and the kernels are then never made:
the compile caches of torch tell two programs apart by the kernels that they can see in an op, not by the environment.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# From 3.10 on Triton contracts a * b + c only where it is told to; until then it warns. Where bits matter a kernel says
# `tl.fma` itself.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
    # triton_op would warn of the missing Triton at every op; `use_triton` says it once, and only where it matters.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)

__all__ = ["KERNELS_EXIST", "is_traced", "jit", "launcher", "tl", "triton", "use_triton"]

OLDEST_CAPABILITY = (7, 5)
SWITCH = os.environ.get("FASTCIFAR_KERNELS", "triton")
if SWITCH not in ("triton", "reference"):
    raise ValueError(f"FASTCIFAR_KERNELS must be 'triton' or 'reference', not {SWITCH!r}.")

KERNELS_EXIST = triton is not None and SWITCH == "triton"

if KERNELS_EXIST:
    jit = triton.jit
else:

    def jit(function):
        """Leaves `function` a plain one, which is never launched."""
        return function


def launcher(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Has `launch` run with the GPU of its first tensor as the current one: Triton launches there, wherever the
    tensors are.
    """

    @functools.wraps(launch)
    def launch_on_device(*arguments: Any, **options: Any) -> Any:
        first = next(argument for argument in (*arguments, *options.values()) if isinstance(argument, Tensor))
        with _device_of(first):
            return launch(*arguments, **options)

    return launch_on_device


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Nothing in Triton's interpreter, nor while a compiler traces, which sees to the device itself."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda and not is_traced(tensor) else nullcontext()


def is_traced(tensor: Tensor) -> bool:
    """Whether a graph is being recorded, whose tensors have neither values nor addresses."""
    return type(tensor) is not Tensor or torch.compiler.is_compiling()


def use_triton(tensor: Tensor) -> bool:
    """Whether an op on `tensor` runs its Triton kernel; a GPU that has to do without is told why on stderr, once."""
    if tensor.device.type in ("cpu", "meta") or SWITCH == "reference":
        return False
    reason = _obstacle(tensor.device)
    if reason is not None:
        _say_once(f"fastcifar: ops run as plain torch, without their kernels: {reason}.")
    return reason is None


@functools.cache
def _obstacle(device: torch.device) -> str | None:
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return f"there are none for {device.type} devices"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, and they need sm_75 or later"
    try:
        triton.runtime.driver.active.utils  # noqa: B018  which Triton compiles when it is first asked for
    except Exception as error:
        return f"Triton cannot start ({str(error).split('.')[0]})"
    return None


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)
