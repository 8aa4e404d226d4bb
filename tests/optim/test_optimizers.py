"""Every optimiser, against torch's plainest form of it, and what else a run needs of it."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config import OptimConfig
from fastcifar.errors import ConfigError
from fastcifar.models import build_model
from fastcifar.optim import OPTIMIZERS
from fastcifar.optim.optimizers import MUON_LR_RATIO, build_optimizer

EACH = pytest.mark.parametrize("name", OPTIMIZERS)
PLAIN = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "sgd-nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "sgd without momentum": torch.optim.SGD,
    "sgd-nesterov without momentum": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
}
"""Torch's optimisers, run in double precision; Muon has a file of its own."""


def network(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    model = build_model("resnet", classes=5, image_size=8, blocks=(1, 1), channels=(4, 7))
    return model.to(device, memory_format=torch.channels_last)


def config(name: str, **settings: float) -> OptimConfig:
    return OptimConfig(optimizer=name, lr=0.01, weight_decay=0.01, **settings)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(6, 3, 8, 8, generator=generator).to(next(model.parameters()))
        F.cross_entropy(model(images), torch.arange(6) % 5).backward()
        set_lr(optimizer, 0.01 / (1 + step))
        optimizer.step()
        optimizer.zero_grad()


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": t
        for name, parameter in model.named_parameters()
        for key, t in optimizer.state[parameter].items()
    }


@pytest.mark.parametrize("name", PLAIN)
def test_equals_torchs_plain_form_in_float64(name):
    """There are 8 steps, so that RAdam's rectification has begun."""
    model, plain = network(), network().double()
    theirs = PLAIN[name](plain.parameters(), 0.01, weight_decay=0.01, foreach=False)
    for group in theirs.param_groups:
        group["lr_ratio"] = 1.0
    own, _, without = name.partition(" ")
    train(model, build_optimizer(model, config(own, momentum=0.0) if without else config(own)), range(8))
    train(plain, theirs, range(8))
    for (key, ours), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours.double(), other, rtol=2e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


@EACH
def test_the_state_is_there_from_the_start_and_can_be_copied(name):
    """It is zero, laid out as its parameter, and made without a trace in parameters and gradients.

    Going on from a copy gives the same bits.
    """
    whole, first, second = network(), network(), network()
    optimizer, resumed = build_optimizer(first, config(name)), build_optimizer(second, config(name))
    for parameter, other in zip(first.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, other)
        assert parameter.grad is None
        for tensor in optimizer.state[parameter].values():
            assert not tensor.any()
            assert tensor.dim() == 0 or tensor.stride() == parameter.stride()
    train(whole, build_optimizer(whole, config(name)), range(5))
    train(first, optimizer, range(3))
    second.load_state_dict(first.state_dict())
    own, trained = state(second, resumed), state(first, optimizer)
    assert own.keys() == trained.keys()
    for key, tensor in trained.items():
        own[key].copy_(tensor)
    train(second, resumed, range(3, 5))
    for (key, ours), other in zip(second.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, other), key


@EACH
def test_norms_and_biases_decay_only_if_asked(name):
    model = network()
    optim = config(name, decay_norms=False)
    optimizer, before = build_optimizer(model, optim), [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) == (parameter.dim() == 1)
    groups = build_optimizer(network(), config(name)).param_groups
    assert {group["weight_decay"] for group in groups} == {0.01}


def test_what_an_optimiser_does_not_read_is_refused():
    assert OptimConfig("rmsprop").resolved.momentum == 0.0
    assert OptimConfig("adam").resolved.momentum is None
    with pytest.raises(ConfigError, match="the optimiser adam does not read momentum; it reads lr, weight_decay"):
        OptimConfig("adam", momentum=0.9)
    with pytest.raises(ConfigError, match="the sharpness sam does not read eta; it reads rho"):
        OptimConfig(sharpness="sam", eta=0.9)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "clip_norm", "rho", "eta"])
@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_numbers_that_no_step_can_use_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}; expected"):
        OptimConfig(sharpness="asam", **{name: value})


def test_muons_groups_are_the_hidden_matrices_and_the_rest():
    model = network()
    matrix, rest = build_optimizer(model, OptimConfig(optimizer="muon", lr=0.1)).param_groups
    assert [p.dim() for p in matrix["params"]] == [4] * 6
    assert (matrix["lr_ratio"], rest["lr_ratio"], rest["lr"]) == (1.0, MUON_LR_RATIO, 0.1 * MUON_LR_RATIO)
    assert any(p is model.classifier.weight for p in rest["params"])
    (only,) = build_optimizer(nn.Linear(3, 2), OptimConfig(optimizer="muon")).param_groups
    assert not only["orthogonalize"]


def assert_overflow_is_skipped(model, optimizer):
    """Hands over an overflow as a gradient scaler does, and expects the same weights and state after the step."""
    before = {key: t.clone() for key, t in (state(model, optimizer) | dict(model.named_parameters())).items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    optimizer.step()
    for key, tensor in (state(model, optimizer) | dict(model.named_parameters())).items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", [name for name, own in OPTIMIZERS.items() if own.form != "foreach"])
@pytest.mark.parametrize("done", [0, 2])
def test_an_overflow_is_skipped_without_asking_the_host(name, done):
    """A gradient scaler hands it over, in the first step or later; one that did not overflow divides by the scale."""
    model, plain = network(), network()
    optimizer, reference = build_optimizer(model, config(name)), build_optimizer(plain, config(name))
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        pytest.skip("this torch's Adagrad leaves it to the scaler")
    for net, own in ((model, optimizer), (plain, reference)):
        train(net, own, range(done))
    assert_overflow_is_skipped(model, optimizer)

    optimizer.found_inf = torch.tensor(0.0)
    for net, scale, own in ((model, 1024.0, optimizer), (plain, 1.0, reference)):
        torch.manual_seed(0)
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter) * scale
        own.step()
    for (key, ours), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["sgd", "sgd-nesterov"])
@pytest.mark.parametrize("as_number", [lambda value: value, torch.tensor], ids=["number", "tensor"])
def test_a_cycled_momentum_is_torchs_set_before_every_step(name, as_number):
    """An overflow, which a gradient scaler hands over, moves neither weights nor momenta."""
    model, plain = network(), network().double()
    ours = build_optimizer(model, config(name), cycled=True)
    theirs = torch.optim.SGD(plain.parameters(), 0.01, 0.95, weight_decay=0.01, nesterov=name == "sgd-nesterov")
    for step in range(6):
        for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            other["lr_ratio"], other["momentum"] = 1.0, 0.95 - 0.02 * step
            group["cycled"] = as_number(other["momentum"])
        train(model, ours, range(step, step + 1))
        train(plain, theirs, range(step, step + 1))
    for (key, own), other in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(
            own.double(), other[1], rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert_overflow_is_skipped(model, ours)


@pytest.mark.usefixtures("card")
@EACH
def test_a_gpu_steps_as_a_cpu_does_and_does_not_wait(name):
    model, reference = network("cuda"), network()
    optimizer = build_optimizer(model, config(name))
    theirs = build_optimizer(reference, config(name))
    for step in range(7):
        torch.manual_seed(step)
        for ours, other in zip(model.parameters(), reference.parameters(), strict=True):
            other.grad = torch.randn_like(other)
            ours.grad = other.grad.to("cuda", copy=True)
        table = torch.full((), 0.01 / (1 + step), device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for group in optimizer.param_groups:
                group["lr"].copy_(table * group["lr_ratio"])
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        set_lr(theirs, 0.01 / (1 + step))
        theirs.step()
    tolerance = {"rtol": 0.0, "atol": 2e-3} if name == "muon" else {"rtol": 1e-4, "atol": 1e-6}
    for (key, ours), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), other, **tolerance, msg=lambda text, key=key: f"{key}: {text}")
