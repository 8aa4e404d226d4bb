"""SAM and ASAM, against formulas in float64, and what they must leave as it was."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config import OptimConfig
from fastcifar.models import build_model
from fastcifar.optim.averaging import Buckets
from fastcifar.optim.optimizers import build_optimizer
from fastcifar.optim.sharpness import Ascend, Return

SAM, ASAM = OptimConfig(sharpness="sam"), OptimConfig(sharpness="asam")
KINDS = pytest.mark.parametrize("optim", [SAM, ASAM], ids=["sam", "asam"])


def network() -> nn.Module:
    torch.manual_seed(0)
    model = build_model("resnet", classes=5, image_size=8, blocks=(1, 1), channels=(4, 7))
    return model.to(memory_format=torch.channels_last)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5


def backward(model: nn.Module, scale: float = 1.0) -> None:
    images, labels = batch()
    (scale * F.cross_entropy(model(images), labels)).backward()


def displacement(model: nn.Module, optim: OptimConfig, scale: float = 1.0) -> dict[str, Tensor]:
    ascend = Ascend(model, Buckets(model), optim)
    backward(model, scale)
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    ascend(None)
    return {name: parameter.detach().double() - before[name] for name, parameter in model.named_parameters()}


@KINDS
def test_equals_the_papers_formulas_in_float64(optim):
    """Every parameter of the network is part of one vector: w + rho * T T g / |T g|."""
    model, optim = network(), optim.resolved
    backward(model)
    named = dict(model.named_parameters())
    g = torch.cat([parameter.grad.double().flatten() for parameter in named.values()])
    extents = {name: torch.ones(parameter.shape, dtype=torch.float64) for name, parameter in named.items()}
    if optim.sharpness == "asam":
        extents |= {
            name: named[name].detach().double().abs() + optim.eta for name in named if not name.endswith("bias")
        }
    t = torch.cat([extent.flatten() for extent in extents.values()])
    expected = optim.rho * t * t * g / (t * g).square().sum().sqrt()
    model.zero_grad()
    moved = torch.cat([move.flatten() for move in displacement(model, optim).values()])
    assert float(expected.norm()) > 0.01
    # What is added to a weight of magnitude 1 is rounded by up to 6e-8.
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1.5e-7)


@KINDS
def test_a_scaled_loss_gives_the_same_point(optim):
    plain, scaled = displacement(network(), optim), displacement(network(), optim, scale=65536.0)
    for name, move in plain.items():
        assert torch.equal(move, scaled[name]), name


@KINDS
@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0])
def test_gradients_without_a_direction_move_nothing(optim, value):
    """Such gradients overflow in one value, or all vanish."""
    model = network()
    buckets = Buckets(model)
    ascend, before = Ascend(model, buckets, optim), buckets.flat[0].clone()
    backward(model)
    for parameter in model.parameters():
        if value == 0.0:
            parameter.grad.zero_()
    model.stem.weight.grad[2, 1, 0, 1] = value
    ascend(None)
    assert torch.equal(buckets.flat[0], before)


@KINDS
def test_weights_and_statistics_come_back_to_the_bit(optim):
    model, once = network(), network()
    backward(once)
    buckets = Buckets(model)
    ascend, before = Ascend(model, buckets, optim), buckets.flat[0].clone()
    backward(model)
    ascend(None)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.equal(buckets.flat[0], before)
    backward(model)
    second = [parameter.grad.clone() for parameter in model.parameters()]
    Return(ascend)(None)
    assert torch.equal(buckets.flat[0], before)
    for ours, theirs in zip(model.buffers(), once.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    for parameter, other, gradient in zip(model.parameters(), once.parameters(), second, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert not torch.equal(parameter.grad, other.grad)


def test_frozen_parameters_stay():
    model = network()
    model.stem.weight.requires_grad_(False)
    moves = displacement(model, ASAM)
    assert not moves["stem.weight"].any()
    assert moves["classifier.weight"].any()


def test_several_steps_equal_a_plain_loop():
    """Clipping must see the second gradient, and SGD must move the restored weights."""
    model, plain = network(), network()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=1e-3))
    theirs = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    ascend = Ascend(model, Buckets(model), SAM)
    for _ in range(3):
        backward(model)
        ascend(None)
        backward(model)
        Return(ascend)(None)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

        backward(plain)
        statistics = [buffer.clone() for buffer in plain.buffers()]
        norm = sum(parameter.grad.double().square().sum() for parameter in plain.parameters()).sqrt()
        moves = [0.05 * parameter.grad / norm for parameter in plain.parameters()]
        for parameter, move in zip(plain.parameters(), moves, strict=True):
            parameter.data += move
        plain.zero_grad()
        backward(plain)
        for parameter, move in zip(plain.parameters(), moves, strict=True):
            parameter.data -= move
        for buffer, old in zip(plain.buffers(), statistics, strict=True):
            buffer.copy_(old)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        theirs.step()
        theirs.zero_grad()
    for (name, ours), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("card")
@KINDS
def test_a_graph_captures_it(optim):
    """The captured step does the same as an uncaptured one, which also proves that nothing waits."""
    model, other = (network().cuda() for _ in range(2))
    pair = []
    for net in (model, other):
        buckets = Buckets(net)
        images, labels = (tensor.cuda() for tensor in batch())
        F.cross_entropy(net(images), labels).backward()
        pair.append((buckets, Ascend(net, buckets, optim)))
    (captured, ascend), (plain, reference) = pair
    held = [
        parameter.grad for parameter in model.parameters()
    ]  # the ascent drops them, and the graph reads their memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ascend(None)
    graph.replay()
    reference(None)
    torch.testing.assert_close(captured.flat[0], plain.flat[0], rtol=1e-6, atol=1e-7)
    assert held
