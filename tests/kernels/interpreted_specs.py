"""Every op's kernels in Triton's interpreter: what its `OpSpec` declares, then what is odd of some. `test_specs.py`
runs this file.

Whatever is allocated holds NaNs, or the largest integers of its dtype, until written, so that an output left unwritten
shows in the result. Every address that a kernel reads or writes must lie in one of its arguments.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
from test_batch_norm_kernel import arguments, assert_as_accurate, evaluate, large_mean
from test_specs import CPU, DIFFERENTIABLE, SPECS, check, make, outcome, random_gradient, rows
from test_squeeze_excite_kernel import AT_ODD_SHAPES, odd_cases
from torch import Tensor
from triton.runtime import interpreter

import fastcifar.kernels
from fastcifar.kernels import averaging, batch_norm
from fastcifar.kernels.averaging import ema_kernel, launch_ema_update
from fastcifar.kernels.batch_norm import batch_norm_relu
from fastcifar.kernels.compilation import Compilation
from fastcifar.kernels.spec import Case, OpSpec

MODULES = [
    importlib.import_module(f"fastcifar.kernels.{module.name}")
    for module in pkgutil.iter_modules(fastcifar.kernels.__path__)
]


@pytest.fixture(autouse=True)
def allocations_are_poison() -> Iterator[None]:
    """Has torch fill what is allocated, as it does for deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails at the first access outside of the kernel's arguments."""
    regions: list[tuple[int, int]] = []
    launch, load, store = (
        interpreter.GridExecutor.__call__,
        interpreter._interpreter.load,
        interpreter._interpreter.store,
    )

    def launch_within(self: Any, *arguments: Any, **options: Any) -> None:
        regions[:] = [region(value) for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        launch(self, *arguments, **options)

    def load_within(addresses: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        assert_within(addresses[mask], np.dtype(dtype).itemsize)
        return load(addresses, mask, other, dtype)

    def store_within(addresses: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        assert_within(addresses[mask], values.itemsize)
        store(addresses, values, mask)

    def assert_within(addresses: np.ndarray, size: int) -> None:
        inside = np.zeros(addresses.shape, bool)
        for start, end in regions:
            inside |= (addresses >= start) & (addresses + size <= end)
        assert inside.all(), "an access out of bounds"

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_within)
    monkeypatch.setattr(interpreter._interpreter, "load", load_within)
    monkeypatch.setattr(interpreter._interpreter, "store", store_within)


def region(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and behind its last."""
    extent = (
        1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel()
        else 0
    )
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.itemsize


@pytest.fixture(autouse=True)
def rounded_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds float32 to bfloat16 as every card does; the interpreter cuts it short."""
    from triton.language import bfloat16, float32

    convert = interpreter._convert_float

    def convert_or_round(values: np.ndarray, from_dtype: Any, to_dtype: Any, rounding: Any) -> np.ndarray:
        if (from_dtype, to_dtype) != (float32, bfloat16):
            return convert(values, from_dtype, to_dtype, rounding)
        rounded = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", convert_or_round)


@pytest.fixture(autouse=True)
def sums_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums along an axis as a card does, by a tree; numpy adds up all but the last axis one by one, with an error
    that grows with it.
    """
    add_up = interpreter.ReduceOps.sum

    def tree(self: Any, input: Any) -> Any:
        if self.axis is None:
            return add_up(self, input)
        values = np.moveaxis(input.handle.data, self.axis, -1)
        while values.shape[-1] > 1:
            values = values[..., ::2] + values[..., 1::2]
        values = np.moveaxis(values, -1, self.axis)
        return self.to_tensor(values if self.keep_dims else values.squeeze(self.axis), input.dtype)

    monkeypatch.setattr(interpreter.ReduceOps, "sum", tree)


@pytest.fixture(autouse=True)
def loop_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets numpy from 2.4 read the bound of a loop, an array of one element, which Triton 3.6 leaves to `int`."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index_too(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index_too)


@pytest.fixture
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops take their kernels' branch; torch wraps no interpreted kernel, so that these are launched as they are."""
    for module in MODULES:
        for name, replacement in (("use_triton", lambda tensor: True), ("wrap_triton", lambda kernel: kernel)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)


@rows(SPECS, devices=["cpu"])
def test_the_launcher(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(spec, case, dtype, device, run=spec.launch)


@pytest.mark.usefixtures("kernels_on_the_cpu")
@rows(DIFFERENTIABLE, devices=["cpu"])
def test_gradients_through_the_op(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(spec, case, dtype, device, gradient=random_gradient(spec, case, dtype, device))


@pytest.mark.usefixtures("kernels_on_the_cpu")
@rows(DIFFERENTIABLE, devices=["cpu"], all_dtypes=False)
def test_gradients_behind_a_sum(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(spec, case, dtype, device, gradient=random_gradient(spec, case, dtype, device, of_a_sum=True))


@pytest.mark.usefixtures("kernels_on_the_cpu")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_through_the_op(spec: OpSpec) -> None:
    check(spec, spec.small_cases()[0], spec.dtypes[-1])


@rows([averaging.SPEC], devices=["cpu"])
def test_averages_have_the_bits_of_the_reference(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    ours, plain = (
        outcome(spec, function, make(spec, case, dtype, device)) for function in (spec.launch, spec.reference)
    )
    assert all(torch.equal(result, plain[name]) for name, result in ours.items())


@pytest.mark.usefixtures("kernels_on_the_cpu")
@pytest.mark.parametrize("case", odd_cases())
def test_squeeze_excite_at_odd_shapes(case: Case) -> None:
    check(AT_ODD_SHAPES, case, torch.float32, gradient=random_gradient(AT_ODD_SHAPES, case, torch.float32, CPU))


@pytest.fixture(params=[0, batch_norm.ROWS_OF_ONE_PART], ids=["two-launches", "one-launch"])
def several_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kernels_on_the_cpu: None) -> None:
    """Batch norm of small tiles, in each of its ways."""
    monkeypatch.setattr(batch_norm, "ROWS_OF_ONE_PART", request.param)
    monkeypatch.setattr(batch_norm, "TILE", 64)


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("size", [(1, 3, 5, 7), (1, 17, 33, 1), (5, 16, 33, 1)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("addend", "skip"), [(False, None), (False, "output"), (True, "input")])
def test_batch_norm_of_several_tiles(
    size: tuple[int, ...], residual: bool, addend: bool, skip: batch_norm.Skip | None
) -> None:
    assert_as_accurate(batch_norm_relu, arguments(size, residual, addend=addend, skip=skip))


@pytest.mark.usefixtures("several_tiles")
def test_batch_norm_of_a_large_mean() -> None:
    assert_as_accurate(batch_norm_relu, large_mean((4, 5, 9, 9)))


@pytest.mark.usefixtures("several_tiles")
def test_batch_norm_takes_gradients_of_any_strides() -> None:
    given = arguments((3, 5, 4, 2))
    expanded = torch.randn(3, 5, 1, 1).expand(3, 5, 4, 2)
    expected = evaluate(batch_norm_relu, given, expanded.contiguous(memory_format=torch.channels_last))
    for name, result in evaluate(batch_norm_relu, given, expanded).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("residual", [False, True])
def test_a_nan_stays_in_its_channel_and_passes_the_relu(residual: bool) -> None:
    given = arguments((3, 5, 4, 2), residual)
    given["x"][1, 2, 3, 1] = torch.nan
    results = evaluate(batch_norm_relu, given, torch.ones(3, 5, 4, 2))
    for name in ("y", "x"):
        channels = results[name].transpose(0, 1).flatten(1).isnan()
        assert channels.all(1).tolist() == channels.any(1).tolist() == [False, False, True, False, False]


def test_kernels_are_interpreted() -> None:
    compilations: list[Compilation] = [
        compilation for module in MODULES for compilation in getattr(module, "COMPILATIONS", ())
    ]
    assert compilations
    assert not any(isinstance(compilation.kernel, triton.JITFunction) for compilation in compilations)


def test_what_is_allocated_is_poison() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.ones(3, dtype=torch.bfloat16).new_empty(2).isnan().all()
    assert (torch.empty_like(torch.zeros(3, dtype=torch.uint8)) == 255).all()


@pytest.mark.parametrize("lengths", [(4, 5), (5, 4)], ids=["write", "read"])
def test_an_access_out_of_bounds_is_noticed(lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    average, source = map(torch.zeros, lengths)
    monkeypatch.setattr(source, "numel", lambda: 5)
    with pytest.raises(Exception, match="an access out of bounds"):
        launch_ema_update(ema_kernel, average, source, torch.tensor(0.5))
