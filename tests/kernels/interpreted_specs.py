"""Every op's kernels in Triton's interpreter, as its `OpSpec` declares, then special cases of some.

`test_specs.py` runs this file. Whatever is allocated holds NaNs, or the largest integers of its dtype, until written,
so that an output left unwritten shows in the result. Every address that a kernel reads or writes must lie in one of its
arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compilation import kernels_chosen
from harness import CPU, assert_same_bits, check, make, outcome, rows
from op_specs import SPECS, Case, OpSpec
from op_specs.batch_norm import INTO_A_BLOCK, OUT_OF_A_BLOCK, case
from test_batch_norm_kernel import SPEC, check_a_large_mean
from torch import Tensor
from triton.runtime import interpreter

from fastcifar.kernels import batch_norm_kernels
from fastcifar.kernels.averaging import ema_kernel


@pytest.fixture(autouse=True)
def allocations_are_poison() -> Iterator[None]:
    """Has torch fill what is allocated, as it does for deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def kernels_on_the_cpu() -> Iterator[None]:
    """Launches kernels as they are, since torch wraps no interpreted kernel."""
    with kernels_chosen(lambda kernel: kernel):
        yield


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    regions: list[tuple[int, int]] = []
    run, memory = interpreter.GridExecutor.__call__, interpreter._interpreter
    load, store = memory.load, memory.store

    def run_within(self: Any, *arguments: Any, **options: Any) -> None:
        regions[:] = [region(value) for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        run(self, *arguments, **options)

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

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_within)
    monkeypatch.setattr(memory, "load", load_within)
    monkeypatch.setattr(memory, "store", store_within)


def region(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1 if tensor.numel() else 0) * tensor.itemsize


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
    """Sums along an axis by a tree, as a card does.

    numpy adds up all but the last axis one by one, with an error that grows with it.
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


@rows(SPECS, devices=["cpu"], all_dtypes=False)
def test_kernels_are_as_accurate_as_torch(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(spec, case, dtype, device)


@rows([spec for spec in SPECS if spec.differentiable], devices=["cpu"], all_dtypes=False, most_on_cpu=3)
def test_gradients_behind_a_sum(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(spec, case, dtype, device, of_a_sum=True)


@rows([spec for spec in SPECS if spec.same_bits], devices=["cpu"], all_dtypes=False)
def test_kernels_give_the_bits_of_the_reference(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    ours = outcome(spec, spec.op, make(spec, case, dtype, device))
    with kernels_chosen(lambda kernel: kernel, chosen=False):
        assert_same_bits(spec, ours, outcome(spec, spec.op, make(spec, case, dtype, device)))


@pytest.fixture(params=[0, batch_norm_kernels.ROWS_OF_ONE_PART], ids=["two-launches", "one-launch"])
def several_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the tiles of batch norm small, in each of its ways."""
    monkeypatch.setattr(batch_norm_kernels, "ROWS_OF_ONE_PART", request.param)
    monkeypatch.setattr(batch_norm_kernels, "TILE", 64)


TILED = [
    case((1, 3, 5, 7), residual=True, addend=True),
    case((1, 17, 33, 1), **INTO_A_BLOCK),
    case((5, 16, 33, 1), **OUT_OF_A_BLOCK),
    case((5, 16, 33, 1)),
]


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_batch_norm_of_several_tiles(case: Case) -> None:
    check(SPEC, case, torch.float32)


@pytest.mark.usefixtures("several_tiles")
def test_batch_norm_of_a_large_mean() -> None:
    check_a_large_mean((4, 5, 9, 9), CPU)


@pytest.mark.usefixtures("several_tiles")
@pytest.mark.parametrize("residual", [False, True])
def test_a_nan_stays_in_its_channel_and_passes_the_relu(residual: bool) -> None:
    given = make(SPEC, case((3, 5, 4, 2), residual=residual), torch.float32, CPU)
    given["x"][1, 2, 3, 1] = torch.nan
    results = outcome(SPEC, SPEC.op, given, torch.ones(3, 5, 4, 2))
    for name in ("result 0", "gradient of x"):
        channels = results[name].transpose(0, 1).flatten(1).isnan()
        assert channels.all(1).tolist() == channels.any(1).tolist() == [False, False, True, False, False]


def test_what_is_allocated_is_poison() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.ones(3, dtype=torch.bfloat16).new_empty(2).isnan().all()
    assert (torch.empty_like(torch.zeros(3, dtype=torch.uint8)) == 255).all()


@pytest.mark.parametrize("lengths", [(4, 5), (5, 4)], ids=["write", "read"])
def test_an_access_out_of_bounds_is_noticed(lengths: tuple[int, int]) -> None:
    average, source = map(torch.zeros, lengths)
    with pytest.raises(Exception, match="an access out of bounds"):
        ema_kernel[(1,)](average, source, torch.tensor(0.5), 5, AVERAGES=1, BLOCK=8)
