"""Every op's kernels in Triton's interpreter, made from its `OpSpec`. Run with TRITON_INTERPRET=1, as `test_specs.py` does.

Whatever is allocated holds NaNs, or the largest integers of its dtype, until written, and stands amid them, as does every argument: an
output left unwritten and a read out of bounds show in the result, a write out of bounds in what stands around.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
from test_specs import DIFFERENTIABLE, SPECS, check, random_gradient, rows, tensors
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastcifar.kernels
from fastcifar.kernels.compilation import Compilation
from fastcifar.kernels.spec import Arguments, Case, OpSpec

PADDING = 1024
MODULES = [importlib.import_module(f"fastcifar.kernels.{module.name}") for module in pkgutil.iter_modules(fastcifar.kernels.__path__)]


class Guard:
    """Lays tensors amid poison: NaNs, or the largest integers."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.originals: Arguments = {}

    def prepare(self, arguments: Arguments) -> Arguments:
        """Copies of arguments amid poison; the originals stay, since an argument may hold addresses of others."""
        self.originals = arguments
        return tree_map_only(Tensor, lambda tensor: self.amid_poison(tensor).copy_(tensor), arguments)

    def amid_poison(self, tensor: Tensor) -> Tensor:
        """All poison, with the shape and strides of a tensor."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        buffer = torch.full((extent + 2 * PADDING,), poison(tensor.dtype), dtype=tensor.dtype)
        self.buffers.append(buffer)
        return buffer[PADDING : PADDING + extent].as_strided(tensor.shape, tensor.stride())

    def assert_unharmed(self) -> None:
        for buffer in self.buffers:
            for padding in (buffer[:PADDING], buffer[-PADDING:]):
                assert (padding.isnan() if padding.is_floating_point() else padding == poison(padding.dtype)).all()


def poison(dtype: torch.dtype) -> float | int | bool:
    return torch.nan if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).max


@pytest.fixture(autouse=True)
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    """Guards whatever is allocated, and what the test gives it, until the end of the test."""
    guard = Guard()

    def guarded(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_amid_poison(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return guard.amid_poison(tensor) if tensor.numel() else tensor

        return allocate_amid_poison

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, guarded(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, guarded(getattr(Tensor, name)))
    yield guard
    guard.assert_unharmed()


@pytest.fixture(autouse=True)
def rounded_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds float32 to bfloat16 as every card does; the interpreter cuts it short."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_or_round(values: np.ndarray, from_dtype: Any, to_dtype: Any, rounding: Any) -> np.ndarray:
        if (from_dtype, to_dtype) != (float32, bfloat16):
            return convert(values, from_dtype, to_dtype, rounding)
        rounded = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", convert_or_round)


@pytest.fixture
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops take their kernels' branch; torch wraps no interpreted kernel, so that these are launched as they are."""
    for module in MODULES:
        for name, replacement in (("use_triton", lambda tensor: True), ("wrap_triton", lambda kernel: kernel)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)


@rows(SPECS, devices=["cpu"])
def test_the_launcher(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device, guard: Guard) -> None:
    check(spec, case, dtype, device, run=spec.launch, prepare=guard.prepare)


@pytest.mark.usefixtures("kernels_on_the_cpu")
@rows(DIFFERENTIABLE, devices=["cpu"])
def test_gradients_through_the_op(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device, guard: Guard) -> None:
    check(spec, case, dtype, device, gradient=random_gradient(spec, case, dtype, device), prepare=guard.prepare)


@pytest.mark.usefixtures("kernels_on_the_cpu")
@rows(DIFFERENTIABLE, devices=["cpu"], all_dtypes=False)
def test_gradients_behind_a_sum(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device, guard: Guard) -> None:
    check(spec, case, dtype, device, gradient=random_gradient(spec, case, dtype, device, of_a_sum=True), prepare=guard.prepare)


@pytest.mark.usefixtures("kernels_on_the_cpu")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_through_the_op(spec: OpSpec, guard: Guard) -> None:
    check(spec, spec.small_cases()[0], spec.dtypes[-1], prepare=guard.prepare)


def test_kernels_are_interpreted() -> None:
    compilations: list[Compilation] = [compilation for module in MODULES for compilation in getattr(module, "COMPILATIONS", ())]
    assert compilations
    assert not any(isinstance(compilation.kernel, triton.JITFunction) for compilation in compilations)


def test_what_is_allocated_is_poison() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.ones(3, dtype=torch.bfloat16).new_empty(2).isnan().all()
    assert (torch.empty_like(torch.zeros(3, dtype=torch.uint8)) == 255).all()


def test_a_write_beside_a_tensor_is_noticed() -> None:
    guard = Guard()
    (values,) = tensors(guard.prepare({"values": torch.zeros(2, 3).T})).values()
    assert torch.equal(values, torch.zeros(3, 2))
    guard.assert_unharmed()
    values.as_strided((8,), (1,)).zero_()
    with pytest.raises(AssertionError):
        guard.assert_unharmed()
