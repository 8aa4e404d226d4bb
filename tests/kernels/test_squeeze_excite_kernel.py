"""Squeeze-and-excitation beyond what its `OpSpec` says: dtypes of weights, autocast, launches, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import CPU, check, make, needs_kernels
from op_specs.squeeze_excite import SPEC, case

from fastcifar.kernels.squeeze_excite import squeeze_excite, squeeze_excite_backward, squeeze_excite_forward

WEIGHTS = SPEC.differentiable[2:]
ODD = case((3, 17, 5, 7, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_may_have_the_dtype_of_x(dtype: torch.dtype) -> None:
    given = make(SPEC, ODD, dtype, CPU)
    half = {**given, **{name: given[name].to(dtype).requires_grad_() for name in WEIGHTS}}
    wide = {**given, **{name: half[name].detach().float().requires_grad_() for name in WEIGHTS}}
    ours, expected = (
        torch.autograd.grad(squeeze_excite(**each).sum(), [each[name] for name in WEIGHTS]) for each in (half, wide)
    )
    assert all(torch.equal(one, other.to(dtype)) for one, other in zip(ours, expected, strict=True))


def test_autocast_changes_nothing() -> None:
    given = make(SPEC, ODD, torch.bfloat16, CPU)
    weight = given["reduce_weight"].requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = squeeze_excite(**given)
        results.append((y, *torch.autograd.grad(y.sum(), weight)))
    assert all(torch.equal(plain, cast) for plain, cast in zip(*results, strict=True))


def test_an_empty_batch_is_passed_on() -> None:
    given = make(SPEC, case((0, 17, 5, 7, 2)), torch.float32, CPU)
    y = squeeze_excite(**{**given, "expand_weight": given["expand_weight"].requires_grad_()})
    assert y.shape == (0, 17, 5, 7)
    assert not torch.autograd.grad(y.sum(), given["expand_weight"])[0].any()


def test_compiles_to_one_graph_for_all_batch_sizes() -> None:
    torch.compiler.reset()
    compiled = torch.compile(squeeze_excite, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (3, 5):
        check(SPEC, case((samples, 17, 5, 7, 2)), torch.float32, run=compiled)


FORWARD = [["y_ptr", "pooled_ptr", "hidden_ptr", "gate_ptr"]]
BACKWARD = [
    ["grad_x_ptr", "grad_residual_ptr", "grad_expanded_ptr", "grad_hidden_ptr"],
    ["grad_reduce_weight_ptr", "grad_reduce_bias_ptr", "grad_expand_weight_ptr", "grad_expand_bias_ptr"],
]


@needs_kernels
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ((8, 2048, 1, 1, 128), True),
        ((8, 256, 8, 8, 16), True),
        ((2, 256, 9, 8, 16), False),
        ((2, 512, 1, 1, 513), False),
    ],
    ids=["smallest-map", "largest-sample", "larger-sample", "larger-weights"],
)
def test_on_a_gpu_the_compiled_step_launches_one_and_two_kernels_or_is_the_reference(
    sizes: tuple[int, ...], fits: bool, kernel_writes: Callable[..., list[list[str]]]
) -> None:
    given = make(SPEC, case(sizes), torch.bfloat16, CPU)
    inputs = [value for name, value in given.items() if name != "skip"]
    assert kernel_writes(squeeze_excite_forward, *inputs) == (FORWARD if fits else [])
    y, *intermediates = squeeze_excite_forward(*inputs)
    saved = given["x"], y, *intermediates, given["reduce_weight"], given["expand_weight"]
    assert kernel_writes(squeeze_excite_backward, y, y, *saved, True) == (BACKWARD if fits else [])
