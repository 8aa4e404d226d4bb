"""The layers with a kernel of their own, against torch's modules and timm's, and when they choose their op."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import needs_kernels
from timm.layers import SEModule
from tolerances import assert_as_accurate_as_torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from fastcifar.kernels import dispatch
from fastcifar.models import build_model, layers
from fastcifar.models.layers import BatchNorm2d, SqueezeExcite

SIZE = (3, 10, 5, 7)
AUTOCAST = "bf16 autocast"
VARIANTS = pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, False), (True, True)])
LAYERS = pytest.mark.parametrize("layer", ["batch_norm_relu", "squeeze_excite"])
"""Layers by the names of their ops."""
IN_HALVES = pytest.mark.parametrize("kind", [torch.float32, AUTOCAST], ids=str)
IN_ALL_TYPES = pytest.mark.parametrize("kind", [torch.float32, torch.float64, AUTOCAST], ids=str)


class ThenReLU(nn.Module):
    def __init__(self, module: nn.Module, relu: bool) -> None:
        super().__init__()
        self.module, self.relu = module, relu

    def forward(self, x: Tensor, residual: Tensor | None = None, **_: bool) -> Tensor:
        y = self.module(x)
        y = y if residual is None else y + residual
        return F.relu(y) if self.relu else y


def built(layer: str, relu: bool = False) -> nn.Module:
    return BatchNorm2d(SIZE[1], relu) if layer == "batch_norm_relu" else SqueezeExcite(SIZE[1], 4)


def pair(layer: str, relu: bool) -> tuple[nn.Module, nn.Module]:
    ours = built(layer, relu)
    theirs = nn.BatchNorm2d(SIZE[1]) if layer == "batch_norm_relu" else SEModule(SIZE[1], rd_channels=4)
    state = [tensor for tensor in theirs.state_dict().values() if tensor.is_floating_point()]
    with torch.no_grad():
        for mine, his in zip(ours.state_dict().values(), state, strict=True):
            if isinstance(ours, BatchNorm2d):
                nn.init.uniform_(mine, 0.5, 1.5)
            his.copy_(mine.view(his.shape))
    return ours, ThenReLU(theirs, relu)


def activations(kind: torch.dtype | str, residual: bool, size: tuple[int, ...] = SIZE) -> list[Tensor]:
    """Draws an input in channels_last, and a residual if asked for; for autocast, in bfloat16 as from a convolution."""
    dtype = torch.bfloat16 if kind == AUTOCAST else kind
    return [torch.randn(size).to(dtype, memory_format=torch.channels_last) for _ in range(1 + residual)]


def outcome(
    module: nn.Module, kind: torch.dtype | str, inputs: list[Tensor], grad_y: Tensor, relu: bool
) -> list[Tensor]:
    """Returns the result, the gradients of the inputs and, as vectors, those of the parameters, and the buffers."""
    dtype = torch.float64 if kind == torch.float64 else None
    inputs = [tensor.detach().to(grad_y.device, dtype).requires_grad_() for tensor in inputs]
    with torch.autocast(grad_y.device.type, torch.bfloat16) if kind == AUTOCAST else contextlib.nullcontext():
        y = module(*inputs, **({"relu": relu} if isinstance(module, SqueezeExcite | ThenReLU) else {}))
    gradients = torch.autograd.grad(y, [*inputs, *module.parameters()], grad_y.to(y.dtype))
    buffers = [buffer.clone() for buffer in module.buffers() if buffer.is_floating_point()]
    return [y.detach(), *gradients[: len(inputs)], *(part.flatten() for part in gradients[len(inputs) :]), *buffers]


def assert_layer_is_as_accurate(layer: str, kind: torch.dtype | str, residual: bool, relu: bool, device: str) -> None:
    torch.manual_seed(0)  # chance rules sums of few values
    dtype = torch.float64 if kind == torch.float64 else None
    ours, theirs = (module.to(device, dtype) for module in pair(layer, relu))
    exact = copy.deepcopy(theirs).double()
    inputs = [tensor.to(device) for tensor in activations(kind, residual, (64, *SIZE[1:]))]
    grad_y = torch.randn_like(inputs[0])
    expected, found = (outcome(module, kind, inputs, grad_y, relu) for module in (theirs, ours))
    truth = outcome(exact, torch.float64, inputs, grad_y.double(), relu)
    for mine, his, true in zip(found, expected, truth, strict=True):
        assert_as_accurate_as_torch(mine, his, true)


@VARIANTS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@IN_ALL_TYPES
def test_batch_norm_is_torchs_to_the_bit(kind: torch.dtype | str, training: bool, residual: bool, relu: bool) -> None:
    dtype = torch.float64 if kind == torch.float64 else None
    ours, theirs = (module.train(training).to(dtype) for module in pair("batch_norm_relu", relu))
    inputs = activations(kind, residual)
    grad_y = torch.randn_like(inputs[0])
    expected = outcome(theirs, kind, inputs, grad_y, relu)
    for mine, his in zip(outcome(ours, kind, inputs, grad_y, relu), expected, strict=True):
        assert mine.dtype == his.dtype
        assert torch.equal(mine, his)


@VARIANTS
@IN_HALVES
def test_squeeze_excite_is_as_accurate_as_timms(kind: torch.dtype | str, residual: bool, relu: bool) -> None:
    assert_layer_is_as_accurate("squeeze_excite", kind, residual, relu, "cpu")


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


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_update_bn_and_resets_and_cumulative_averages_are_torchs(
    kernels: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "use_triton", lambda tensor: kernels)
    batches = torch.randn(4, 6, 5, 3, 3) * torch.arange(1, 5).view(4, 1, 1, 1, 1)
    found = []
    for norm in (BatchNorm2d(5), nn.BatchNorm2d(5)):
        network = nn.Sequential(torch.compile(norm, backend="eager") if compiled else norm)
        network(batches[0])
        update_bn(batches[1:], network)
        cumulative = norm.running_mean.clone(), norm.running_var.clone(), torch.tensor(norm.momentum)
        network(batches[0])
        moved = norm.running_mean.clone()
        norm.reset_parameters()
        reset = norm.running_mean.clone(), norm.running_var.clone()
        norm.momentum = None
        for batch in batches:
            network(batch)
        found.append((*cumulative, moved, *reset, norm.running_mean, norm.running_var))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    assert not any("num_batches_tracked" in key for key in BatchNorm2d(5).state_dict())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the ops that the layers call, which now do nothing, on a GPU that has kernels."""
    calls: list[str] = []
    for name in ("batch_norm_relu", "squeeze_excite"):
        monkeypatch.setattr(layers, name, lambda x, *_, name=name, **__: calls.append(name) or x)
    monkeypatch.setattr(dispatch, "obstacle", lambda device: None)
    return calls


@contextlib.contextmanager
def pretended_card(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Makes tensors created within fake, on a GPU and of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            yield
    finally:
        torch.set_default_dtype(before)


@needs_kernels
@LAYERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_on_a_gpu_the_op_is_chosen(layer: str, dtype: torch.dtype, residual: bool, calls: list[str]) -> None:
    with pretended_card():
        x = torch.empty(SIZE, dtype=dtype)
        built(layer)(x, x if residual else None)
    assert calls == [layer]


@needs_kernels
@LAYERS
def test_what_the_op_does_not_take_is_a_plain_expression(
    layer: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float64, torch.float16):
        with pretended_card(dtype):
            built(layer)(torch.empty(SIZE))
    with pretended_card():
        built(layer)(torch.empty(SIZE), torch.empty(SIZE, dtype=torch.float64))
        BatchNorm2d(10).eval()(torch.empty(SIZE, dtype=torch.bfloat16))
    built(layer)(torch.randn(SIZE))
    built(layer).to("meta")(torch.empty(SIZE, device="meta"))
    monkeypatch.setattr(dispatch, "SWITCH", "reference")
    with pretended_card():
        built(layer)(torch.empty(SIZE))
    assert calls == []


@needs_kernels
@LAYERS
def test_a_traced_layer_leaves_it_to_the_op_to_ask_the_driver(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card here is too old, so that the op is in the graph and runs its reference."""
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(dispatch, "obstacle", lambda device: "the card is older than sm_75")
    with pretended_card():
        torch.compile(built(layer), backend=record, fullgraph=True)(torch.empty(SIZE))
    assert "autograd_function_apply" in graphs[0]


@pytest.fixture
def ops_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "use_triton", lambda tensor: True)


@pytest.mark.usefixtures("ops_on_the_cpu")
@VARIANTS
@IN_HALVES
@LAYERS
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
    plain = outcome(copy.deepcopy(model), torch.float32, [images], grad_y, True)
    request.getfixturevalue("ops_on_the_cpu")
    for found, expected in zip(outcome(model, torch.float32, [images], grad_y, True), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("ops_on_the_cpu")
@LAYERS
def test_the_ops_take_nchw_tensors_and_put_out_channels_last(layer: str) -> None:
    x = torch.randn(SIZE)
    y = built(layer)(x, x)
    assert y.shape == SIZE
    assert y.is_contiguous(memory_format=torch.channels_last)


@LAYERS
@IN_HALVES
@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=[pytest.mark.gpu, needs_kernels])],
)
def test_compiled_whole_it_computes_the_same(layer: str, kind: torch.dtype | str, device: str) -> None:
    torch.compiler.reset()
    module = built(layer).to(device)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
    inputs = [tensor.to(device) for tensor in activations(kind, True)]
    grad_y = torch.randn_like(inputs[0])
    how: dict[str, Any] = dict.fromkeys(("rtol", "atol"), 1e-4 if kind == torch.float32 else 2e-2)
    results = [outcome(each, kind, inputs, grad_y, False) for each in (compiled, module)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **how)


@pytest.mark.gpu
@needs_kernels
@VARIANTS
@IN_HALVES
@LAYERS
def test_on_a_gpu_is_as_accurate_as_torch(layer: str, kind: torch.dtype | str, residual: bool, relu: bool) -> None:
    assert_layer_is_as_accurate(layer, kind, residual, relu, "cuda")
