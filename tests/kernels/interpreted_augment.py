"""The augmentation kernel in Triton's interpreter. Run with TRITON_INTERPRET=1, as its neighbour does.

Every tensor stands amid NaNs, or the largest integers of its dtype: an access out of bounds would bring them into the output, or change
them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_augment_kernel import arguments

from fastcifar.kernels import augment as module
from fastcifar.kernels.augment import DTYPES, FILLS, augment, augment_kernel, augment_reference, launch_augment

PADDING = 1027


def padded(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer with the largest integers, or NaNs, on both sides of `values`, and the view of them in it."""
    dtype = values.dtype
    poison = torch.nan if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).max
    buffer = torch.full((values.numel() + 2 * PADDING,), poison, dtype=dtype)
    view = buffer[PADDING:-PADDING].view(values.shape)
    view.copy_(values)
    return buffer, view


def references(given: dict[str, Any]) -> list[torch.Tensor]:
    """What the kernel may give: for bfloat16, the interpreter cuts float32 short where every card rounds."""
    rounded = augment_reference(**given)
    if given["out_dtype"] != torch.bfloat16:
        return [rounded]
    wide = augment_reference(**{**given, "out_dtype": torch.float32})
    return [rounded, (wide.view(torch.int32) >> 16 << 16).view(torch.float32).to(torch.bfloat16)]


def assert_kernel_equals_reference(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, through_op: bool = False) -> None:
    expected = references(given)
    guarded = {name: padded(value) for name, value in given.items() if isinstance(value, torch.Tensor)}
    guarded["output"] = padded(torch.full_like(expected[0], 77))
    buffers = {name: buffer for name, (buffer, _) in guarded.items()}
    views = {name: view for name, (_, view) in guarded.items()}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    output = views.pop("output")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *size, **options: output)
        if through_op:
            patch.setattr(module, "use_triton", lambda tensor: True)
            # torch 2.11 wraps no interpreted kernel.
            patch.setattr(module, "wrap_triton", lambda kernel: kernel)
            result = augment(**{**given, **views})
        else:
            result = launch_augment(augment_kernel, **{**given, **views})
    assert any(torch.equal(result, values) for values in expected)
    output.fill_(77)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bilinear", [False, True], ids=["nearest", "bilinear"])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("size", [(5, 8), (17, 23)], ids=str)
def test_everything_on(size: tuple[int, int], fill: str, bilinear: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_kernel_equals_reference(arguments(size, out_dtype=dtype, fill=fill, bilinear=bilinear), monkeypatch)


@pytest.mark.parametrize("absent", [mask for mask in range(16) if mask], ids=lambda mask: f"{mask:04b}")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16], ids=str)
def test_whatever_is_left_out(absent: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("index", "warp", "grey", "boxes")
    left_out = {name: None for bit, name in enumerate(names) if absent >> bit & 1}
    assert_kernel_equals_reference({**arguments((5, 8), count=7, out_dtype=dtype), **left_out}, monkeypatch)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (32, 32), (33, 31)], ids=str)
@pytest.mark.parametrize("bilinear", [False, True], ids=["nearest", "bilinear"])
def test_sizes(size: tuple[int, int], bilinear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_kernel_equals_reference(arguments(size, count=2, fill="reflect", bilinear=bilinear), monkeypatch)


@pytest.mark.parametrize("count", [0, 1])
def test_few_images(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_kernel_equals_reference(arguments((5, 8), count=count), monkeypatch)


@pytest.mark.parametrize("boxes", [1, 64])
def test_numbers_of_boxes(boxes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_kernel_equals_reference(arguments((17, 23), count=2, boxes=boxes), monkeypatch)


def test_through_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_kernel_equals_reference(arguments((17, 23)), monkeypatch, through_op=True)


def test_the_kernel_is_interpreted() -> None:
    assert type(augment_kernel).__name__ == "InterpretedFunction"
