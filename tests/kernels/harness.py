"""Runs an op as its `OpSpec` declares, and compares it with its rival in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from op_specs import Arguments, Case, OpSpec
from tolerances import assert_as_accurate_as_torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastcifar.kernels.dispatch import KERNELS_EXIST

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

needs_kernels = pytest.mark.skipif(not KERNELS_EXIST, reason="Triton is absent or FASTCIFAR_KERNELS=reference")


def rows(
    specs: Iterable[OpSpec],
    devices: Iterable[str] = ("cpu", "cuda"),
    all_dtypes: bool = True,
    most_on_cpu: int | None = None,
) -> Any:
    """Parametrises over spec, case, dtype and device.

    On a CPU there are at most `most_on_cpu` cases of a spec. Without `all_dtypes` the dtypes take turns.
    """
    parameters = [
        pytest.param(
            spec,
            case,
            dtype,
            torch.device(device),
            id=f"{spec.name}-{case.name}-{str(dtype).removeprefix('torch.')}-{device}",
            marks=[pytest.mark.gpu, needs_kernels] if device == "cuda" else [],
        )
        for device in devices
        for spec in specs
        for place, case in enumerate(spec.cases if device == "cuda" else spec.small_cases()[:most_on_cpu])
        for dtype in (spec.dtypes if all_dtypes else [spec.dtypes[place % len(spec.dtypes)]])
    ]
    return pytest.mark.parametrize(("spec", "case", "dtype", "device"), parameters)


def make(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Arguments:
    torch.manual_seed(0)
    return spec.make(case.shape, dtype, device)


def in_float64(arguments: Arguments) -> Arguments:
    """Casts every floating point tensor to float64, and likewise a dtype that an op is to put out."""
    wide = tree_map_only(Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, arguments)
    if arguments.get("out_dtype", torch.uint8) != torch.uint8:
        wide["out_dtype"] = torch.float64
    return wide


def outcome(
    spec: OpSpec, function: Callable[..., Any], arguments: Arguments, gradient: Tensor | None = None
) -> dict[str, Tensor]:
    """Returns what a function computes, by name: its results and, given the gradient of the first, those of arguments.

    If the next result has a gradient, it is half the first one's.
    """
    names = [name for name in spec.differentiable if arguments[name] is not None] if gradient is not None else []
    leaves = [arguments[name].requires_grad_() for name in names]
    results = spec.results(arguments, function(**arguments))
    found = {f"result {place}": result.detach() for place, result in enumerate(results)}
    if not leaves:
        return found
    returned = [result for result in results if result.requires_grad]
    given = [as_gradient_of(result, gradient / 2**place) for place, result in enumerate(returned)]
    gradients = torch.autograd.grad(returned, leaves, given)
    return {**found, **{f"gradient of {name}": value for name, value in zip(names, gradients, strict=True)}}


def as_gradient_of(result: Tensor, gradient: Tensor) -> Tensor:
    """Casts the gradient to a result's dtype and layout; a smaller one is expanded over the last dimension.

    A smaller one is what a sum gives.
    """
    if gradient.shape != result.shape:
        return gradient.to(result.dtype).expand_as(result)
    return torch.empty_like(result).copy_(gradient)


def random_gradient(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device = CPU, of_a_sum: bool = False
) -> Tensor | None:
    """Draws a gradient of the first result, rounded to `dtype`, or None for an op without one.

    The gradient of a sum over the last dimension has size 1 there.
    """
    if not spec.differentiable:
        return None
    arguments = in_float64(make(spec, case, dtype, device))
    shape = spec.results(arguments, spec.rival(**arguments))[0].shape
    return torch.randn((*shape[:-1], 1) if of_a_sum else shape, device=device).to(dtype)


def check(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    device: torch.device = CPU,
    *,
    run: Callable[..., Any] | None = None,
    of_a_sum: bool = False,
    measure: Callable[..., dict[str, Tensor]] = outcome,
) -> None:
    """Asserts that `run`, by default the op, and its gradients are as accurate as torch.

    They must change nothing but what they may. `measure` takes their outcome, where that differs from the rival's.
    """
    gradient = random_gradient(spec, case, dtype, device, of_a_sum)
    exact = outcome(spec, spec.rival, in_float64(make(spec, case, dtype, device)), gradient)
    theirs = outcome(spec, spec.rival, make(spec, case, dtype, device), gradient)
    arguments, untouched = make(spec, case, dtype, device), make(spec, case, dtype, device)
    ours = measure(spec, run or spec.op, arguments, gradient)
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, result in ours.items():
        assert_as_accurate_as_torch(result, theirs[name], exact[name], spec.multiple, name)
    kept = [name for name, value in untouched.items() if isinstance(value, Tensor) and name not in spec.mutates]
    changed = [name for name in kept if not torch.equal(untouched[name], arguments[name])]
    assert not changed, f"changed, though not among what it mutates: {', '.join(changed)}"


def assert_same_bits(spec: OpSpec, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, result in ours.items():
        assert torch.equal(result.cpu(), theirs[name].cpu()), f"{name} of {spec.name} has other bits"
