"""Decides where an op runs, as its Triton kernels or as its reference in plain torch, and launches the kernels.

`FASTCIFAR_KERNELS=reference` switches all kernels off. It is read once, at import, and the kernels are then never made:
the compile caches of torch tell two programs apart by the kernels that they can see in an op, not by the environment.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

# From 3.10 on Triton contracts a * b + c only where it is told to; until then it warns. Where bits matter a kernel
# calls `tl.fma` itself.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
    # triton_op would warn of the missing Triton at every op; `use_triton` says it once, and only where it matters.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)

__all__ = ["KERNELS_EXIST", "is_traced", "jit", "launch", "obstacle", "tl", "triton", "use_triton"]

OLDEST_CAPABILITY = (7, 5)
SWITCH = os.environ.get("FASTCIFAR_KERNELS", "triton")
if SWITCH not in ("triton", "reference"):
    raise ValueError(f"FASTCIFAR_KERNELS must be 'triton' or 'reference', not {SWITCH!r}.")

KERNELS_EXIST = triton is not None and SWITCH == "triton"


def jit(function: Callable[..., Any]) -> Any:
    """Applies `triton.jit`; without kernels `function` stays a plain one, which is never launched."""
    return function if triton is None or SWITCH == "reference" else triton.jit(function)


def use_triton(tensor: Tensor) -> bool:
    """Returns whether an op on `tensor` runs its Triton kernels; where a GPU cannot, says why on stderr, once.

    Layers ask this too, to choose between their op and a plain expression. While torch.compile traces a layer, the
    driver cannot be asked and every GPU counts as new enough; the op then asks again, and runs its reference on a GPU
    that is too old.
    """
    if SWITCH == "reference" or tensor.device.type in ("cpu", "meta"):
        return False
    if torch.compiler.is_dynamo_compiling():
        return KERNELS_EXIST and tensor.device.type == "cuda"
    reason = obstacle(tensor.device)
    if reason is not None:
        say_once(f"fastcifar: ops run as plain torch, without their kernels: {reason}.")
    return reason is None


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Returns why no kernels run on `device`, which is not a CPU, or None where they do."""
    if SWITCH == "reference":
        return "switched off by FASTCIFAR_KERNELS"
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return f"there are none for {device.type} devices"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, older than sm_75"
    try:
        # Triton compiles this when it is first asked for.
        triton.runtime.driver.active.utils  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:
        return f"the driver of Triton cannot start ({str(error).split('.')[0]})"
    return None


@functools.cache
def say_once(line: str) -> None:
    print(line, file=sys.stderr)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches `kernel` on the GPU of its first argument, a tensor: Triton itself launches on the current GPU.

    In Triton's interpreter there is no GPU to choose, and a compiler that traces chooses it itself.
    """
    first = arguments[0]
    with torch.cuda.device(first.device) if first.is_cuda and not is_traced(first) else nullcontext():
        kernel[grid](*arguments, **options)


def is_traced(tensor: Tensor) -> bool:
    """Returns whether a graph is being recorded, whose tensors have neither values nor addresses."""
    return type(tensor) is not Tensor or torch.compiler.is_compiling()
