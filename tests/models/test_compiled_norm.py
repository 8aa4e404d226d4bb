"""The batch norm of compiled training on a CPU, run uncompiled, against torch's own and float64, and its choice."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_accurate_as_torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar.models.compiled_norm import CompiledNorm
from fastcifar.models.layers import BatchNorm2d

VARIANTS = pytest.mark.parametrize(
    ("residual", "relu"), [(residual, relu) for residual in (False, True) for relu in (False, True)]
)


def usual(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def ours(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return CompiledNorm.apply(x, residual, weight, bias, 1e-5, relu)[0]


def inputs(
    residual: bool, dtype: torch.dtype, mean: float = 0.5, size: tuple[int, ...] = (13, 5, 7, 9)
) -> list[Tensor | None]:
    x = torch.randn(size).add_(mean).to(dtype, memory_format=torch.channels_last)
    skip = torch.randn(size).to(dtype, memory_format=torch.channels_last) if residual else None
    weight, bias = torch.rand(size[1]) + 0.5, torch.randn(size[1])
    return [x, skip, weight, bias]


def outcome(function, tensors: list[Tensor | None], relu: bool, grad: Tensor) -> list[Tensor]:
    leaves = [tensor if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves, relu)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad.to(y.dtype))]


@VARIANTS
@pytest.mark.parametrize("mean", [0.5, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_as_accurate_as_torch(dtype: torch.dtype, mean: float, residual: bool, relu: bool) -> None:
    torch.manual_seed(0)
    tensors = inputs(residual, dtype, mean)
    grad = torch.randn_like(tensors[0])
    exact = outcome(usual, [tensor if tensor is None else tensor.double() for tensor in tensors], relu, grad)
    results = [outcome(function, tensors, relu, grad) for function in (ours, usual)]
    for mine, theirs, true in zip(*results, exact, strict=True):
        assert_as_accurate_as_torch(mine, theirs, true)


@VARIANTS
def test_gradients_are_the_slopes_of_the_result(residual: bool, relu: bool) -> None:
    torch.manual_seed(0)
    tensors = [
        part if part is None else part.double().requires_grad_()
        for part in inputs(residual, torch.float64, size=(3, 2, 2, 3))
    ]
    assert torch.autograd.gradcheck(lambda *leaves: ours(*leaves, relu), tensors)


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_traced_with_its_gradients(dtype: torch.dtype, residual: bool, relu: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    tensors = inputs(residual, dtype)
    grad = torch.randn_like(tensors[0])
    traced = torch.compile(ours, backend="eager", fullgraph=True)
    for one, other in zip(outcome(traced, tensors, relu, grad), outcome(ours, tensors, relu, grad), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_constant_channel_is_its_bias(constant: float) -> None:
    x, _, weight, bias = inputs(False, torch.float32)
    x[:, 2] = constant
    y, mean, var = CompiledNorm.apply(x, None, weight, bias, 1e-5, False)
    assert torch.equal(y[:, 2], bias[2].expand_as(y[:, 2]))
    assert mean[2] == constant
    assert var[2] == 0


def test_the_layer_uses_it_where_it_is_compiled_for_a_cpu() -> None:
    torch.compiler.reset()
    traced = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        traced.append("batch_norm" in graph.code)
        return graph

    x, skip, *_ = inputs(True, torch.float32)
    plain, compiled = (BatchNorm2d(5, relu=True) for _ in range(2))
    run = torch.compile(compiled, backend=record, fullgraph=True)
    torch.testing.assert_close(run(x, skip), plain(x, skip))
    for name, expected in plain.named_buffers():
        torch.testing.assert_close(compiled.get_buffer(name), expected)
    torch.testing.assert_close(run.eval()(x, skip), plain.eval()(x, skip))
    assert traced == [False, True]


def test_one_value_a_channel_is_refused_as_by_torch() -> None:
    torch.compiler.reset()
    with pytest.raises(Exception, match="more than 1 value per channel"):
        torch.compile(BatchNorm2d(5), backend="eager")(torch.randn(1, 5, 1, 1))
