"""How far the result of an op may lie from a float64 reference: one table and one rule for all ops.

The error is the largest difference over the largest magnitude. It may be a small multiple of the error that PyTorch's
own ops make in the same dtype, and where theirs happens to vanish, of half an eps, which is the rounding of the result
alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# In float32 the order of sums decides the error, and that of two sound orders differs threefold by luck; in half
# precision it is the last rounding.
MULTIPLE = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Returns the largest difference from `exact` (float64) over its largest magnitude.

    It is nan where `actual` holds one, and 0 where there is nothing.
    """
    if not exact.numel():
        return 0.0
    smallest = torch.finfo(torch.float64).tiny
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(smallest)).item()


def assert_as_accurate_as_torch(
    actual: Tensor,
    theirs: Tensor,
    exact: Tensor,
    multiple: Mapping[torch.dtype, float] | None = None,
    name: str = "result",
) -> None:
    """Fails where `actual` is further from `exact` (float64) than the table allows, given PyTorch's `theirs`.

    `multiple` overrides the table. Integers must be equal.
    """
    assert actual.dtype == theirs.dtype, f"{name} is {actual.dtype}, not {theirs.dtype}"
    assert actual.shape == theirs.shape == exact.shape, f"{name} is {tuple(actual.shape)}, not {tuple(exact.shape)}"
    if not actual.is_floating_point():
        assert torch.equal(actual, exact), f"{name} differs"
        return
    allowed = {**MULTIPLE, **(multiple or {})}[actual.dtype] * max(
        relative_error(theirs, exact), torch.finfo(actual.dtype).eps / 2
    )
    error = relative_error(actual, exact)
    assert error <= allowed, f"{name} is {error:.2e} from the exact one, and {allowed:.2e} is allowed"
