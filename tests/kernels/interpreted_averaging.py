"""The averaging kernels in Triton's interpreter. Run with TRITON_INTERPRET=1, as its neighbour does.

The source stands amid NaNs, the average amid zeros: an access out of bounds would bring the one into the other.
"""

from __future__ import annotations

import pytest
import torch

from fastcifar.kernels import averaging
from fastcifar.kernels.averaging import (
    BLOCK,
    MOST_AVERAGES,
    SOURCE_DTYPES,
    ema_kernel,
    ema_update_,
    ema_update_reference,
    launch_ema_update,
    launch_swa_update,
    swa_kernel,
    swa_update_reference,
)

PADDING = BLOCK + 3


def padded(values: torch.Tensor, padding: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer with `padding` on both sides of `values`, and the view of them in it."""
    buffer = torch.full((values.numel() + 2 * PADDING,), padding, dtype=values.dtype)
    view = buffer[PADDING:-PADDING]
    view.copy_(values)
    return buffer, view


@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 127, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1])
@pytest.mark.parametrize("through_op", [False, True], ids=["launcher", "op"])
def test_the_kernel_equals_the_reference_and_touches_nothing_else(
    size: int, dtype: torch.dtype, through_op: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decay = torch.tensor(0.99)
    average_buffer, average = padded(torch.randn(size), 0.0)
    source_buffer, source = padded(torch.randn(size).to(dtype), torch.nan)
    expected_buffer, source_before = average_buffer.clone(), source_buffer.clone()
    ema_update_reference(expected_buffer[PADDING:-PADDING], source, decay)
    if through_op:
        monkeypatch.setattr(averaging, "use_triton", lambda tensor: True)
        # torch 2.11 wraps no interpreted kernel.
        monkeypatch.setattr(averaging, "wrap_triton", lambda kernel: kernel)
        ema_update_(average, source, decay)
    else:
        launch_ema_update(ema_kernel, average, source, decay)
    assert torch.equal(average_buffer, expected_buffer)
    torch.testing.assert_close(source_buffer, source_before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, BLOCK + 1, 2 * BLOCK + 1])
@pytest.mark.parametrize("count", range(1, MOST_AVERAGES + 1))
def test_several_warmed_up_decays(count: int, size: int, dtype: torch.dtype) -> None:
    decays, step = torch.tensor([0.3, 0.99, 0.9, 0.5])[:count], torch.tensor(2)
    averages_buffer, flat = padded(torch.randn(count * size), 0.0)
    source_buffer, source = padded(torch.randn(size).to(dtype), torch.nan)
    expected_buffer, expected_step, source_before = averages_buffer.clone(), step.clone(), source_buffer.clone()
    for _ in range(3):
        ema_update_reference(expected_buffer[PADDING:-PADDING].view(count, size), source, decays, expected_step)
        launch_ema_update(ema_kernel, flat.view(count, size), source, decays, step)
    assert torch.equal(averages_buffer, expected_buffer)
    assert step.item() == expected_step.item() == 5
    torch.testing.assert_close(source_buffer, source_before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 1])
def test_the_running_mean(size: int, dtype: torch.dtype) -> None:
    count, expected_count = torch.tensor(0), torch.tensor(0)
    average_buffer, average = padded(torch.full((size,), torch.nan), 0.0)
    expected_buffer = average_buffer.clone()
    for _ in range(4):
        source = padded(torch.randn(size).to(dtype), torch.nan)[1]
        swa_update_reference(expected_buffer[PADDING:-PADDING], source, expected_count)
        launch_swa_update(swa_kernel, average, source, count)
    assert torch.equal(average_buffer, expected_buffer)
    assert count.item() == expected_count.item() == 4


def test_the_kernel_is_interpreted() -> None:
    assert type(ema_kernel).__name__ == "InterpretedFunction"
