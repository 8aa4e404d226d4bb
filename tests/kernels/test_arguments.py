"""Ops refuse arguments with which a kernel would read or write foreign memory, and the error names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import CPU, make
from op_specs import Arguments, Case, augment, averaging, batch_norm, squeeze_excite
from torch import Tensor

IMAGES = make(augment.SPEC, Case("everything", {"count": 3, "size": (5, 8)}), torch.bfloat16, CPU)
WEIGHTS = make(averaging.SPEC, Case("8", {"size": 8}), torch.float32, CPU)
NORM = make(batch_norm.SPEC, batch_norm.case((3, 5, 4, 2), residual=True, addend=True), torch.float32, CPU)
GATE = make(squeeze_excite.SPEC, squeeze_excite.case((3, 17, 5, 7, 2)), torch.float32, CPU)

REFUSED: list[tuple[Callable[..., Any], Arguments, dict[str, list[Any]]]] = [
    (
        augment.SPEC.op,
        IMAGES,
        {
            "images": [IMAGES["images"].int(), IMAGES["images"][0], torch.zeros(3, 5, 8, 4, dtype=torch.uint8)]
            + [torch.zeros(3, *sides, 3, dtype=torch.uint8) for sides in ((0, 8), (1, 32768))],
            "index": [IMAGES["index"].int()],
            "warp": [IMAGES["warp"][1:], IMAGES["warp"].to("meta")],
            "grey": [IMAGES["grey"].byte()],
            "shift": [IMAGES["shift"].long(), IMAGES["shift"][:, :2]],
            "boxes": [IMAGES["boxes"][:, 0]],
            "scale": [IMAGES["scale"].double(), None],
            "out_dtype": [torch.float64],
        },
    ),
    (
        averaging.SPEC.op,
        WEIGHTS,
        {
            "averages": [torch.zeros(8).double(), torch.zeros(8, requires_grad=True)]
            + [torch.zeros(shape) for shape in ((1, 1, 8), (5, 8), (0, 8))],
            "source": [torch.zeros(8).double(), torch.zeros(8, device="meta")],
            "decays": [torch.zeros(1)],
        },
    ),
    (
        batch_norm.SPEC.op,
        NORM,
        {
            "x": [NORM["x"].double(), NORM["x"].contiguous(), NORM["x"][:1, :, :1, :1]],
            "weight": [NORM["weight"].half(), NORM["weight"][1:]],
            "bias": [NORM["bias"].half(), NORM["bias"].to("meta")],
            "running_mean": [NORM["running_mean"].half(), torch.ones(10)[::2]],
            "running_var": [NORM["running_var"].half()],
            "residual": [NORM["residual"].to("meta")],
            "addend": [NORM["addend"].contiguous()],
        },
    ),
    (
        squeeze_excite.SPEC.op,
        GATE,
        {
            "x": [GATE["x"].double(), GATE["x"][:, :, :0]],
            "reduce_weight": [GATE["reduce_weight"].half(), GATE["reduce_weight"][:0], torch.ones(2, 17, 1, 1)],
            "reduce_bias": [GATE["reduce_bias"].to("meta")],
            "expand_weight": [GATE["expand_weight"].bfloat16(), GATE["expand_weight"].T.contiguous()],
            "expand_bias": [GATE["expand_bias"][:, None]],
            "residual": [GATE["residual"].contiguous()],
        },
    ),
]


@pytest.mark.parametrize(
    ("op", "good", "name", "value"),
    [(op, good, name, value) for op, good, bad in REFUSED for name, values in bad.items() for value in values],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_argument_is_named(op: Callable[..., Any], good: Arguments, name: str, value: Any) -> None:
    wrong_dtype = isinstance(value, torch.dtype) or (isinstance(value, Tensor) and value.dtype != good[name].dtype)
    with pytest.raises(TypeError if wrong_dtype else ValueError, match=rf"^{name} must .*\.$"):
        op(**{**good, name: value})
