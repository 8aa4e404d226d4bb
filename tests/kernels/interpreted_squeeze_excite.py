"""The squeeze-and-excitation kernels in Triton's interpreter, at odd shapes. Run with TRITON_INTERPRET=1, as its neighbour does.

Whatever is allocated, and every argument, stands amid NaNs and is of NaNs until written: an element that is read from outside, or never
written, would bring one into a result, and one that is written outside would replace one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_specs import check, random_gradient
from test_squeeze_excite_kernel import AT_ODD_SHAPES, case_of, odd_cases
from torch import Tensor
from triton.runtime import interpreter

from fastcifar.kernels import squeeze_excite as module
from fastcifar.kernels.spec import Arguments, Case
from fastcifar.kernels.squeeze_excite import BACKWARD_KERNELS, FORWARD_KERNELS

PADDING = 1027


@pytest.fixture(autouse=True)
def nans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sends the ops to the interpreted kernels, and their allocations amid NaNs, which must still stand there in the end."""
    buffers = []

    def empty(size: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size([size] if isinstance(size, int) else size)
        buffers.append(torch.full((size.numel() + 2 * PADDING,), torch.nan, dtype=dtype, device=device))
        return buffers[-1][PADDING:-PADDING].view(size)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(
        torch, "empty_like", lambda like: empty(like.numel(), like.dtype, like.device).as_strided(like.shape, like.stride())
    )
    monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    # torch 2.11 wraps no interpreted kernel.
    monkeypatch.setattr(module, "wrap_triton", lambda kernel: kernel)
    yield
    assert all(part.isnan().all() for buffer in buffers for part in (buffer[:PADDING], buffer[-PADDING:]))


@pytest.fixture(autouse=True)
def loop_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets numpy from 2.4 read the bound of a loop, an array of one element, which Triton 3.6 leaves to `int`."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index_too(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index_too)


def amid_nans(arguments: Arguments) -> Arguments:
    return {name: torch.empty_like(value).copy_(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def check_gradients(case: Case, dtype: torch.dtype) -> None:
    check(AT_ODD_SHAPES, case, dtype, gradient=random_gradient(AT_ODD_SHAPES, case, dtype, torch.device("cpu")), prepare=amid_nans)


@pytest.mark.parametrize("largest_tile", [module.FUSED_TILE, 0], ids=["fused", "in-parts"])
@pytest.mark.parametrize("case", odd_cases())
def test_odd_shapes(case: Case, largest_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FUSED_TILE", largest_tile)
    check_gradients(case, torch.float32)


@pytest.mark.parametrize("largest_tile", [module.FUSED_TILE, 0], ids=["fused", "in-parts"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_several_blocks_of_hidden_units_in_half_precision(
    residual: bool, relu: bool, largest_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FUSED_TILE", largest_tile)
    check_gradients(case_of((2, 130, 8, 8, 37), residual, relu), torch.float16)


def test_several_blocks_of_everything() -> None:
    check_gradients(case_of((17, 70, 13, 17, 35)), torch.float32)


def test_the_kernels_are_interpreted() -> None:
    assert {type(kernel).__name__ for kernel in (*FORWARD_KERNELS, *BACKWARD_KERNELS)} == {"InterpretedFunction"}
