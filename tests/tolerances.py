"""How far the result of an op may lie from a float64 reference: one table and one rule for all ops.

The error is the largest difference over the largest magnitude. It may be a small multiple of the error that PyTorch's own ops make in
the same dtype, and where theirs happens to vanish, of half an eps, which is the rounding of the result alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLE = {torch.float32: 2.0, torch.bfloat16: 2.0, torch.float16: 2.0}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The largest difference from `exact` (float64) over its largest magnitude; nan where `actual` holds one."""
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


def assert_as_accurate_as_torch(actual: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Fails where `actual` is further from `exact` (float64) than the table allows, given PyTorch's own result `theirs`."""
    assert actual.dtype == theirs.dtype
    allowed = MULTIPLE[actual.dtype] * max(relative_error(theirs, exact), torch.finfo(actual.dtype).eps / 2)
    assert relative_error(actual, exact) <= allowed
