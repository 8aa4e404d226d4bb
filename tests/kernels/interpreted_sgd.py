"""The SGD kernel in Triton's interpreter, where addresses of CPU tensors are pointers. Run with TRITON_INTERPRET=1, as its neighbour does.

The gradients stand amid NaNs, the buckets hold a mark of their own between and around the parameters: an access out of bounds would bring
the one into the other, or change it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_sgd_kernel import BUCKETS, arguments, assert_buckets_equal, copied

from fastcifar.kernels import sgd as module
from fastcifar.kernels.sgd import ALIGNMENT, SPEC, gradient_table, launch_sgd_update, sgd_kernel, sgd_update_, sgd_update_reference

MARK = 77.0
PADDING = 2 * ALIGNMENT


def amid_nans(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient in the middle of a buffer of NaNs, at a multiple of 16 bytes."""
    buffer = torch.full((gradient.numel() + 2 * PADDING,), torch.nan, dtype=gradient.dtype)
    return buffer.as_strided(gradient.shape, gradient.stride(), PADDING).copy_(gradient)


def marked(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with `MARK` between the parameters, and gradients amid NaNs."""
    inside = torch.zeros(given["parameters"].numel(), dtype=torch.bool)
    for gradient, offset in zip(given["gradients"], given["offsets"], strict=True):
        inside[offset : offset + gradient.numel()] = True
    buckets = {name: given[name].masked_fill(~inside, MARK) for name in BUCKETS if given[name] is not None}
    gradients = [amid_nans(gradient) for gradient in given["gradients"]]
    pairs = zip(gradients, given["offsets"], strict=True)
    views = [buckets["parameters"].as_strided(gradient.shape, gradient.stride(), offset) for gradient, offset in pairs]
    return {**given, **buckets, "gradients": gradients, "table": gradient_table(views, gradients)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SPEC.small_cases(), ids=lambda case: case.name)
def test_the_kernel_equals_the_reference_and_touches_nothing_else(case: Any, dtype: torch.dtype) -> None:
    given = marked(SPEC.make(case.shape, dtype, torch.device("cpu")))
    expected = copied(given)
    sgd_update_reference(**expected)
    launch_sgd_update(sgd_kernel, **given)
    assert_buckets_equal(given, expected)


@pytest.mark.parametrize("averages", [0, 1, 3])
@pytest.mark.parametrize("gathered", [False, True], ids=["addresses", "gathered"])
def test_several_steps(gathered: bool, averages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_traced", lambda tensor: gathered)
    given = marked(arguments(torch.float16, averages=averages, scaled=True))
    expected = {**copied(given), "gradients": given["gradients"], "found_inf": given["found_inf"]}
    for step in range(3):
        given["found_inf"].fill_(step == 1)
        for gradient in given["gradients"]:
            gradient.normal_()
        sgd_update_reference(**expected)
        launch_sgd_update(sgd_kernel, **given)
    assert_buckets_equal(given, expected)


def test_a_skipped_step_keeps_parameters_and_momenta_from_gradients_that_overflowed() -> None:
    given = marked(arguments(torch.float16, averages=1, scaled=True))
    before = [given[name].clone() for name in BUCKETS[:2]]
    given["found_inf"].fill_(1)
    given["gradients"][0].fill_(torch.inf)
    given["gradients"][-1].fill_(torch.nan)
    expected = copied(given)
    sgd_update_reference(**expected)
    launch_sgd_update(sgd_kernel, **given)
    assert_buckets_equal(given, expected)
    assert all(torch.equal(given[name], value) for name, value in zip(BUCKETS[:2], before, strict=True))


def test_through_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    given = marked(arguments(torch.float16, averages=2))
    expected = copied(given)
    sgd_update_reference(**expected)
    monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    # torch 2.11 wraps no interpreted kernel.
    monkeypatch.setattr(module, "wrap_triton", lambda kernel: kernel)
    sgd_update_(**given)
    assert_buckets_equal(given, expected)


def test_the_kernel_is_interpreted() -> None:
    assert type(sgd_kernel).__name__ == "InterpretedFunction"
