"""The layers with a kernel of their own, against torch's modules and timm's, and when they choose the kernel."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.layers import SEModule
from tolerances import assert_as_accurate_as_torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastcifar.kernels.batch_norm import BatchNormReLU, Skip
from fastcifar.kernels.dispatch import KERNELS_EXIST
from fastcifar.models import build_model, layers
from fastcifar.models.layers import BatchNorm2d, SqueezeExcite, has_kernel

SIZE = (3, 10, 5, 7)
VARIANTS = [(residual, relu) for residual in (False, True) for relu in (False, True)]
AUTOCAST = "bf16 autocast"
TYPES = [torch.float32, torch.float64, AUTOCAST]

needs_kernels = pytest.mark.skipif(not KERNELS_EXIST, reason="Triton is absent or FASTCIFAR_KERNELS=reference")


class NormThenReLU(nn.Module):
    """`nn.BatchNorm2d`, an addition and a ReLU, as they are usually written."""

    def __init__(self, channels: int, relu: bool) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(channels), relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        y = y if residual is None else y + residual
        return F.relu(y) if self.relu else y


class TimmThenReLU(nn.Module):
    """timm's squeeze-and-excitation, an addition and a ReLU."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.gate = SEModule(channels, rd_channels=reduced)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        y = self.gate(x)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y


def norms(relu: bool) -> tuple[BatchNorm2d, NormThenReLU]:
    """Ours and torch's, with the same weights and statistics."""
    theirs = NormThenReLU(SIZE[1], relu)
    for tensor in (theirs.norm.weight, theirs.norm.bias, theirs.norm.running_mean, theirs.norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    ours = BatchNorm2d(SIZE[1], relu)
    ours.load_state_dict(
        {name: tensor for name, tensor in theirs.norm.state_dict().items() if name != "num_batches_tracked"}
    )
    return ours, theirs


def gates(reduced: int = 4) -> tuple[SqueezeExcite, TimmThenReLU]:
    """Ours and timm's, with the same weights."""
    ours, theirs = SqueezeExcite(SIZE[1], reduced), TimmThenReLU(SIZE[1], reduced)
    with torch.no_grad():
        for mine, his in ((ours.reduce, theirs.gate.fc1), (ours.expand, theirs.gate.fc2)):
            his.weight.copy_(mine.weight[:, :, None, None])
            his.bias.copy_(mine.bias)
    return ours, theirs


def activations(kind: torch.dtype | str, residual: bool, size: tuple[int, ...] = SIZE) -> list[Tensor]:
    """The input, channels_last, and a residual if so chosen; under autocast in bfloat16, as a convolution puts them
    out.
    """
    dtype = torch.bfloat16 if kind == AUTOCAST else kind
    return [
        torch.randn(size).to(dtype, memory_format=torch.channels_last).requires_grad_() for _ in range(1 + residual)
    ]


def outcome(
    module: nn.Module, kind: torch.dtype | str, inputs: list[Tensor], grad_y: Tensor, **how: bool
) -> list[Tensor]:
    """The result, the gradients of the inputs and, as vectors, those of the parameters, and the buffers."""
    inputs = [
        tensor.detach().to(grad_y.device, grad_y.dtype if kind == torch.float64 else None).requires_grad_()
        for tensor in inputs
    ]
    device = grad_y.device.type
    with torch.autocast(device, torch.bfloat16) if kind == AUTOCAST else contextlib.nullcontext():
        y = module(*inputs, **how)
    gradients = torch.autograd.grad(y, [*inputs, *module.parameters()], grad_y.to(y.dtype))
    vectors = [gradient.flatten() for gradient in gradients[len(inputs) :]]
    return [
        y.detach(),
        *gradients[: len(inputs)],
        *vectors,
        *(b.clone() for b in module.buffers() if b.is_floating_point()),
    ]


@pytest.mark.parametrize(("residual", "relu"), VARIANTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_batch_norm_is_torchs_to_the_bit(kind: torch.dtype | str, training: bool, residual: bool, relu: bool) -> None:
    ours, theirs = (
        module.train(training).to(torch.float64 if kind == torch.float64 else None) for module in norms(relu)
    )
    inputs = activations(kind, residual)
    grad_y = torch.randn_like(inputs[0])
    expected = outcome(theirs, kind, inputs, grad_y)
    for mine, his in zip(outcome(ours, kind, inputs, grad_y), expected, strict=True):
        assert mine.dtype == his.dtype
        assert torch.equal(mine, his)


@pytest.mark.parametrize(("residual", "relu"), VARIANTS)
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_squeeze_excite_is_as_accurate_as_timms(kind: torch.dtype | str, residual: bool, relu: bool) -> None:
    ours, theirs = (module.to(torch.float64 if kind == torch.float64 else None) for module in gates())
    inputs = activations(kind, residual)
    grad_y = torch.randn_like(inputs[0])
    expected, found = (outcome(module, kind, inputs, grad_y, relu=relu) for module in (theirs, ours))
    exact = outcome(theirs.double(), torch.float64, inputs, grad_y.double(), relu=relu)
    for mine, his, true in zip(found, expected, exact, strict=True):
        assert_as_accurate_as_torch(mine, his, true)


def test_batch_norm_loads_torchs_weights_and_its_own() -> None:
    theirs = nn.BatchNorm2d(5)
    theirs(torch.randn(4, 5, 3, 3))
    ours = BatchNorm2d(5, relu=True)
    assert set(theirs.state_dict()) - set(ours.state_dict()) == {"num_batches_tracked"}
    assert ours.load_state_dict(theirs.state_dict(), strict=False).unexpected_keys == ["num_batches_tracked"]
    # As from a safetensors file, which holds no version numbers.
    other = BatchNorm2d(5)
    other.load_state_dict(dict(ours.state_dict()))
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_squeeze_excite_loads_its_own_weights() -> None:
    one, other = SqueezeExcite(6, 2), SqueezeExcite(6, 2)
    assert {name: tuple(tensor.shape) for name, tensor in one.state_dict().items()} == {
        "reduce.weight": (2, 6),
        "reduce.bias": (2,),
        "expand.weight": (6, 2),
        "expand.bias": (6,),
    }
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 6, 3, 3)
    assert torch.equal(one(x), other(x))


CALLS = {
    "batch norm": (lambda: BatchNorm2d(10), "batch_norm_relu"),
    "squeeze and excitation": (lambda: SqueezeExcite(10, 4), "squeeze_excite"),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that the layers call, which now do nothing."""
    calls: list[str] = []
    for _, name in CALLS.values():
        monkeypatch.setattr(layers, name, lambda x, *_, name=name, **__: calls.append(name) or x)
    return calls


@contextlib.contextmanager
def pretended_card(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """What is made within is fake, on a GPU and of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            yield
    finally:
        torch.set_default_dtype(before)


@needs_kernels
@pytest.mark.parametrize("layer", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_on_a_gpu_the_kernel_is_chosen(layer: str, dtype: torch.dtype, residual: bool, calls: list[str]) -> None:
    build, op = CALLS[layer]
    with pretended_card():
        x = torch.empty(SIZE, dtype=dtype)
        build()(x, x if residual else None)
    assert calls == [op]


@needs_kernels
@pytest.mark.parametrize("layer", CALLS)
def test_what_the_kernel_does_not_take_is_a_plain_expression(layer: str, calls: list[str]) -> None:
    build, _ = CALLS[layer]
    for dtype in (torch.float64, torch.float16):
        with pretended_card(dtype):
            build()(torch.empty(SIZE))
    with pretended_card():
        build()(torch.empty(SIZE), torch.empty(SIZE, dtype=torch.float64))
    build()(torch.randn(SIZE))
    build().to("meta")(torch.empty(SIZE, device="meta"))
    assert calls == []


@needs_kernels
def test_in_evaluation_batch_norm_is_a_plain_expression(calls: list[str]) -> None:
    with pretended_card():
        BatchNorm2d(10).eval()(torch.empty(SIZE, dtype=torch.bfloat16))
    assert calls == []


def test_the_switch_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "KERNELS_EXIST", False)
    with pretended_card():
        assert not has_kernel(torch.empty(SIZE), torch.ones(10), None)


@pytest.fixture
def ops_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers call their ops as on a GPU; on a CPU these run their references, forward and backward."""

    def batch_norm_op(
        x: Tensor, *tensors: Tensor | None, momentum: float, eps: float, relu: bool, skip: Skip | None
    ) -> Any:
        return BatchNormReLU.apply(x, *tensors, momentum, eps, relu, skip)

    monkeypatch.setattr(layers, "has_kernel", lambda *_: True)
    monkeypatch.setattr(layers, "batch_norm_relu", batch_norm_op)


@pytest.mark.usefixtures("ops_on_the_cpu")
@pytest.mark.parametrize(("residual", "relu"), VARIANTS)
@pytest.mark.parametrize("kind", [torch.float32, AUTOCAST], ids=str)
@pytest.mark.parametrize("layer", CALLS)
def test_the_ops_agree_with_the_plain_layers(layer: str, kind: torch.dtype | str, residual: bool, relu: bool) -> None:
    assert_layer_is_as_accurate(layer, kind, residual, relu, "cpu")


@pytest.mark.parametrize("pre_activation", [False, True])
@pytest.mark.parametrize("se_ratio", [0.0, 0.25])
def test_a_network_of_ops_trains_as_a_plain_one(
    pre_activation: bool, se_ratio: float, request: pytest.FixtureRequest
) -> None:
    """What its shortcuts take, and the gradients that come back along them, go through the ops."""
    options = {"pre_activation": pre_activation, "final_norm": pre_activation, "se_ratio": se_ratio}
    model = build_model("resnet", blocks=(2, 2), channels=(8, 12), **options)
    images = torch.randn(16, 3, 9, 9).to(memory_format=torch.channels_last)
    grad_y = torch.randn(16, 10)
    plain = outcome(copy.deepcopy(model), torch.float32, [images], grad_y)
    request.getfixturevalue("ops_on_the_cpu")
    for found, expected in zip(outcome(model, torch.float32, [images], grad_y), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("ops_on_the_cpu")
@pytest.mark.parametrize("layer", CALLS)
def test_the_ops_take_nchw_tensors_and_put_out_channels_last(layer: str) -> None:
    x = torch.randn(SIZE)
    y = CALLS[layer][0]()(x, x)
    assert y.shape == SIZE
    assert y.is_contiguous(memory_format=torch.channels_last)


def assert_layer_is_as_accurate(layer: str, kind: torch.dtype | str, residual: bool, relu: bool, device: str) -> None:
    """Of ours: result, gradients and statistics, against the usual modules and these in float64."""
    ours, theirs = (module.to(device) for module in (norms(relu) if layer == "batch norm" else gates()))
    how = {} if layer == "batch norm" else {"relu": relu}
    inputs = [tensor.to(device) for tensor in activations(kind, residual, (64, *SIZE[1:]))]
    grad_y = torch.randn_like(inputs[0])
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    expected, found = (outcome(module, kind, inputs, grad_y, **how) for module in (theirs, ours))
    theirs.load_state_dict(state)
    exact = outcome(theirs.double(), torch.float64, inputs, grad_y.double(), **how)
    for mine, his, true in zip(found, expected, exact, strict=True):
        assert_as_accurate_as_torch(mine, his, true)


def compiled_outcome(build: Callable[[], nn.Module], kind: torch.dtype | str, device: str) -> None:
    """Asserts that a layer, compiled whole, computes what it does uncompiled."""
    torch.compiler.reset()
    torch.manual_seed(0)
    module = build().to(device)
    inputs = [tensor.to(device) for tensor in activations(kind, True)]
    grad_y = torch.randn_like(inputs[0])
    eager = outcome(module, kind, inputs, grad_y)
    torch.manual_seed(0)
    compiled = outcome(torch.compile(build().to(device), fullgraph=True), kind, inputs, grad_y)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if kind == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("layer", CALLS)
@pytest.mark.parametrize("kind", [torch.float32, AUTOCAST], ids=str)
def test_compiles_to_one_graph(layer: str, kind: torch.dtype | str) -> None:
    compiled_outcome(CALLS[layer][0], kind, "cpu")


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("layer", CALLS)
@pytest.mark.parametrize("kind", [torch.float32, AUTOCAST], ids=str)
def test_compiles_to_one_graph_on_a_gpu(layer: str, kind: torch.dtype | str) -> None:
    compiled_outcome(CALLS[layer][0], kind, "cuda")


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize(("residual", "relu"), VARIANTS)
@pytest.mark.parametrize("kind", [torch.float32, AUTOCAST], ids=str)
@pytest.mark.parametrize("layer", CALLS)
def test_on_a_gpu_is_as_accurate_as_torch(layer: str, kind: torch.dtype | str, residual: bool, relu: bool) -> None:
    assert_layer_is_as_accurate(layer, kind, residual, relu, "cuda")
