"""The batch norm kernels in Triton's interpreter. Run with TRITON_INTERPRET=1, as its neighbour does.

Every activation, and all that the launchers allocate, stands amid NaNs and, before it is written, of NaNs: an element that is read from
outside, or never written, would bring one into a result, and one that is written outside would replace one.
"""

from __future__ import annotations

import pytest
import torch
from test_batch_norm_kernel import ODD_CASES, arguments, assert_as_accurate, evaluate, large_mean
from torch import Tensor

from fastcifar.kernels import batch_norm as module
from fastcifar.kernels.batch_norm import DTYPES, TILE, batch_norm_relu
from fastcifar.kernels.spec import Case

PADDING = 4099


class Poison:
    """Allocates as torch.empty and torch.empty_like do, amid NaNs and full of them."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def empty(self, size: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = torch.Size([size] if isinstance(size, int) else size).numel()
        self.buffers.append(torch.full((count + 2 * PADDING,), torch.nan, dtype=dtype, device=device))
        return self.buffers[-1][PADDING:-PADDING].view(size)

    def empty_like(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 1:
            return self.empty(tuple(tensor.shape), tensor.dtype, tensor.device)
        count, channels, height, width = tensor.shape
        return self.empty((count, height, width, channels), tensor.dtype, tensor.device).permute(0, 3, 1, 2)

    def around(self, values: Tensor) -> Tensor:
        return self.empty_like(values).copy_(values)

    def untouched(self) -> bool:
        return all(buffer[:PADDING].isnan().all() and buffer[-PADDING:].isnan().all() for buffer in self.buffers)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """Sends the ops to the interpreted kernels, with poisoned allocations; fails in the end where anything wrote outside."""
    poison = Poison()
    launchers = {"launch_forward": module.launch_forward, "launch_backward": module.launch_backward}

    def guarded(launch):
        def launch_amid_nans(*arguments):
            around = [poison.around(each) if isinstance(each, Tensor) and each.dim() == 4 else each for each in arguments]
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", poison.empty)
                patch.setattr(torch, "empty_like", poison.empty_like)
                results = launch(*around)
            assert poison.untouched()
            return tuple(result.clone() for result in results)

        return launch_amid_nans

    for name, launch in launchers.items():
        monkeypatch.setattr(module, name, guarded(launch))
    monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    # torch 2.11 wraps no interpreted kernel.
    monkeypatch.setattr(module, "wrap_triton", lambda kernel: kernel)
    return poison


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_CASES, ids=lambda case: case.name)
def test_the_kernels_are_as_accurate_as_torch(case: Case, dtype: torch.dtype, poison: Poison) -> None:
    assert_as_accurate(batch_norm_relu, arguments(**case.shape, dtype=dtype))
    assert poison.buffers


@pytest.mark.parametrize("size", [(1, 3, 5, 7), (1, 17, 33, 1), (5, 16, 33, 1)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_parts_of_several_tiles(size: tuple[int, ...], residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 64)
    assert_as_accurate(batch_norm_relu, arguments(size, residual))


@pytest.mark.parametrize("tile", [64, TILE])
def test_a_large_mean(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    assert_as_accurate(batch_norm_relu, large_mean((4, 5, 9, 9)))


def test_gradients_of_any_strides() -> None:
    given = arguments((3, 5, 4, 2))
    expanded = torch.randn(3, 5, 1, 1).expand(3, 5, 4, 2)
    expected = evaluate(batch_norm_relu, given, expanded.contiguous(memory_format=torch.channels_last))
    for name, result in evaluate(batch_norm_relu, given, expanded).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("residual", [False, True])
def test_a_nan_stays_in_its_channel_and_passes_the_relu(residual: bool) -> None:
    given = arguments((3, 5, 4, 2), residual)
    given["x"][1, 2, 3, 1] = torch.nan
    results = evaluate(batch_norm_relu, given, torch.ones(3, 5, 4, 2))
    for name in ("y", "x"):
        channels = results[name].transpose(0, 1).flatten(1).isnan()
        assert channels.all(1).tolist() == channels.any(1).tolist() == [False, False, True, False, False]


def test_the_kernels_repeat_every_bit() -> None:
    given = arguments((3, 5, 4, 2))
    grad_y = torch.randn(3, 5, 4, 2)
    first, second = (evaluate(batch_norm_relu, given, grad_y) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_kernels_are_interpreted() -> None:
    kernels = module.statistics_kernel, module.normalize_kernel, module.reduce_gradient_kernel, module.input_gradient_kernel
    assert {type(kernel).__name__ for kernel in kernels} == {"InterpretedFunction"}
