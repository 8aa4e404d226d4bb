"""Every optimiser against torch's plainest form of it, and what a run needs of it besides."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config import OptimConfig
from fastcifar.errors import ConfigError
from fastcifar.models import build_model
from fastcifar.optim import OPTIMIZERS
from fastcifar.optim.optimizers import MUON_LR_RATIO, build_optimizer, parameter_groups

EACH = pytest.mark.parametrize("name", OPTIMIZERS)
PLAIN = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.01, foreach=False),
    "sgd-nesterov": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=False),
    "adam": lambda p, lr: torch.optim.Adam(p, lr, weight_decay=0.01, foreach=False),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.01, foreach=False),
    "radam": lambda p, lr: torch.optim.RAdam(p, lr, weight_decay=0.01, foreach=False),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr, weight_decay=0.01, foreach=False),
    "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr, weight_decay=0.01, foreach=False),
    "adadelta": lambda p, lr: torch.optim.Adadelta(p, lr, weight_decay=0.01, foreach=False),
}
"""In double precision; Muon has a file of its own."""


def network(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    model = build_model("resnet", classes=5, image_size=8, blocks=(1, 1), channels=(4, 7))
    return model.to(device, memory_format=torch.channels_last)


def config(name: str, **settings: float) -> OptimConfig:
    return OptimConfig(optimizer=name, lr=0.01, weight_decay=0.01, **settings)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """As the training step does it on a CPU."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """On images drawn anew in each step, with a learning rate that changes."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(6, 3, 8, 8, generator=generator).to(next(model.parameters()))
        F.cross_entropy(model(images), torch.arange(6) % 5).backward()
        set_lr(optimizer, 0.01 / (1 + step))
        optimizer.step()
        optimizer.zero_grad()


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """As a checkpoint finds it."""
    return {
        f"{key}.{name}": t
        for name, parameter in model.named_parameters()
        for key, t in optimizer.state[parameter].items()
    }


@pytest.mark.parametrize("name", PLAIN)
def test_equals_torchs_plain_form_in_float64(name):
    """Over 8 steps, so that RAdam's rectification has begun."""
    model, plain = network(), network().double()
    theirs = PLAIN[name](plain.parameters(), 0.01)
    for group in theirs.param_groups:
        group["lr_ratio"] = 1.0
    train(model, build_optimizer(model, config(name)), range(8))
    train(plain, theirs, range(8))
    for (key, ours), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours.double(), other, rtol=2e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


@EACH
def test_the_state_is_there_from_the_start(name):
    """All zero, laid out as its parameter, and made without a trace in parameters and gradients."""
    model, untouched = network(), network()
    optimizer = build_optimizer(model, config(name))
    before = {key: tensor.clone() for key, tensor in state(model, optimizer).items()}
    assert len(before) >= len(list(model.parameters()))
    for parameter, other in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(parameter, other)
        assert parameter.grad is None
        for tensor in optimizer.state[parameter].values():
            assert not tensor.any()
            assert tensor.dim() == 0 or tensor.stride() == parameter.stride()
    train(model, optimizer, range(1))
    assert state(model, optimizer).keys() == before.keys()
    assert any(tensor.any() for tensor in state(model, optimizer).values())


@EACH
def test_going_on_from_a_copied_state_gives_the_same_bits(name):
    whole, first, second = network(), network(), network()
    train(whole, build_optimizer(whole, config(name)), range(7))
    optimizer, resumed = build_optimizer(first, config(name)), build_optimizer(second, config(name))
    train(first, optimizer, range(3))
    second.load_state_dict(first.state_dict())
    own = state(second, resumed)
    for key, tensor in state(first, optimizer).items():
        own[key].copy_(tensor)
    train(second, resumed, range(3, 7))
    for (key, ours), other in zip(second.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, other), key


@EACH
def test_norms_and_biases_decay_only_if_asked(name):
    model = network()
    optim = config(name, decay_norms=False)
    for group in parameter_groups(model, optim.resolved, torch.device("cpu")):
        assert {parameter.dim() > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}
    optimizer, before = build_optimizer(model, optim), [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) == (parameter.dim() == 1)
    groups = parameter_groups(network(), config(name).resolved, torch.device("cpu"))
    assert {group["weight_decay"] for group in groups} == {0.01}


@EACH
def test_what_is_left_out_is_the_optimisers_own(name):
    own, resolved = OPTIMIZERS[name], OptimConfig(optimizer=name).resolved
    assert (resolved.lr, resolved.weight_decay, resolved.momentum) == (own.lr, own.weight_decay, own.momentum)
    if own.momentum is None:
        with pytest.raises(ConfigError, match=f"the optimiser {name} does not read momentum; leave it out"):
            OptimConfig(optimizer=name, momentum=0.9)


def test_every_parameter_is_in_one_group():
    for name in OPTIMIZERS:
        model = network()
        members = [
            p for group in build_optimizer(model, config(name, decay_norms=False)).param_groups for p in group["params"]
        ]
        assert len(members) == len(set(members)) == len(list(model.parameters()))


def test_muons_groups_are_the_hidden_matrices_and_the_rest():
    model = network()
    matrix, rest = build_optimizer(model, OptimConfig(optimizer="muon", lr=0.1)).param_groups
    assert [p.dim() for p in matrix["params"]] == [4] * 6
    assert (matrix["lr_ratio"], rest["lr_ratio"], rest["lr"]) == (1.0, MUON_LR_RATIO, 0.1 * MUON_LR_RATIO)
    assert any(p is model.classifier.weight for p in rest["params"])
    (only,) = build_optimizer(nn.Linear(3, 2), OptimConfig(optimizer="muon")).param_groups
    assert not only["orthogonalize"]


@pytest.mark.parametrize("name", ["sgd", "sgd-nesterov", "muon"])
def test_without_momentum(name):
    """SGD is the gradient alone, Nesterov or not."""
    model, plain = network(), network()
    train(model, build_optimizer(model, config(name, momentum=0.0)), range(2))
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, weight_decay=0.01)
    optimizer.param_groups[0]["lr_ratio"] = 1.0
    train(plain, optimizer, range(2))
    same = [
        torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    ]
    assert all(same) == (name != "muon")


@pytest.mark.parametrize("name", [name for name, own in OPTIMIZERS.items() if own.form != "foreach"])
@pytest.mark.parametrize("done", [0, 2])
def test_an_overflow_is_skipped_without_asking_the_host(name, done):
    """As a gradient scaler hands it over, in the first step or later; one that did not overflow divides by the
    scale.
    """
    model, plain = network(), network()
    optimizer, reference = build_optimizer(model, config(name)), build_optimizer(plain, config(name))
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        pytest.skip("this torch's Adagrad leaves it to the scaler")
    for net, own in ((model, optimizer), (plain, reference)):
        train(net, own, range(done))
    before = {key: t.clone() for key, t in (state(model, optimizer) | dict(model.named_parameters())).items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    optimizer.step()
    for key, tensor in (state(model, optimizer) | dict(model.named_parameters())).items():
        assert torch.equal(tensor, before[key]), key

    optimizer.found_inf = torch.tensor(0.0)
    for net, scale, own in ((model, 1024.0, optimizer), (plain, 1.0, reference)):
        torch.manual_seed(0)
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter) * scale
        own.step()
    for (key, ours), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


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
