"""Batch norm beyond what its `OpSpec` says: torch's module, a large mean, launches, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import CPU, CUDA, check, make, needs_kernels
from op_specs import Arguments
from op_specs.batch_norm import INTO_A_BLOCK, OUT_OF_A_BLOCK, SPEC, case

from fastcifar.kernels.batch_norm import batch_norm_relu, batch_norm_relu_backward, batch_norm_relu_forward
from fastcifar.kernels.batch_norm_kernels import MOST_CHANNELS, MOST_PARTS, TILE, split


def check_a_large_mean(size: tuple[int, ...], device: torch.device) -> None:
    def make_large(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
        given = SPEC.make(shape, dtype, device)
        x = torch.randn(size, device=device).mul_(0.01).add_(100).to(memory_format=torch.channels_last)
        return {**given, "x": x}

    check(replace(SPEC, make=make_large), case(size, relu=False), torch.float32, device)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("size", [(4, 5, 9, 9), (128, 16, 32, 32)], ids=str)
def test_kernels_are_accurate_for_a_large_mean(size: tuple[int, ...]) -> None:
    check_a_large_mean(size, CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_dtype(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert batch_norm_relu(**make(SPEC, case((3, 5, 4, 4)), dtype, CPU)).dtype == dtype


@needs_kernels
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("how", [{}, {"residual": True}, INTO_A_BLOCK, OUT_OF_A_BLOCK], ids=str)
@pytest.mark.parametrize("one_launch", [False, True])
def test_on_a_gpu_the_compiled_step_holds_one_kernel_or_two_each_way(
    one_launch: bool, how: dict[str, Any], relu: bool, kernel_writes: Callable[..., list[list[str]]]
) -> None:
    given = make(SPEC, case((2, 16, 16, 16 if one_launch else 17), relu=relu, **how), torch.bfloat16, CPU)
    x, weight, bias, residual, addend = (given[name] for name in ("x", "weight", "bias", "residual", "addend"))
    vectors = weight, bias, given["running_mean"], given["running_var"]
    forward = kernel_writes(batch_norm_relu_forward, x, *vectors, residual, addend, 0.1, 1e-5, relu)
    total, results = ["sum_ptr"] * ("addend" in how), ["y_ptr", "statistics_ptr", "running_mean_ptr", "running_var_ptr"]
    assert forward == ([[*results, *total]] if one_launch else [["partials_ptr", *total], results])

    y, skip = x if "residual" in how and relu else None, how.get("skip")
    inputs = x, x if skip else None, x, y, weight, bias, torch.ones(2, 16), relu, skip
    backward = kernel_writes(batch_norm_relu_backward, *inputs)
    masked = [] if y is None else ["grad_residual_ptr"]
    results = ["grad_x_ptr", "grad_weight_ptr", "grad_bias_ptr"]
    assert backward == ([[*results, *masked]] if one_launch else [["partials_ptr", *masked], results])


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 1000, 4097, 1_048_576, 10_000_001])
@pytest.mark.parametrize("channels", [1, 17, 64, 130, 2048])
def test_the_split_covers_the_rows_and_stays_small(rows: int, channels: int) -> None:
    span, (parts, blocks), parts_held, block_c, tile_rows = split(rows, channels)
    assert (parts - 1) * span < rows <= parts * span
    assert (blocks - 1) * block_c < channels <= blocks * block_c
    assert parts <= parts_held <= MOST_PARTS
    assert block_c <= MOST_CHANNELS
    assert tile_rows * block_c <= TILE
    assert all(size & (size - 1) == 0 for size in (parts_held, block_c, tile_rows))
