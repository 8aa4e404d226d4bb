"""Weights kept in low precision, against autocast."""

from dataclasses import replace

import pytest
import torch
from small_training import DROPOUT, METHODS, assert_same_weights, image_set, run
from torch import nn

from fastcifar.config import EngineConfig
from fastcifar.engine import state
from fastcifar.engine.shadow import Shadow, shadow_dtype
from fastcifar.engine.trainer import Trainer
from fastcifar.models import build_model
from fastcifar.models.layers import SqueezeExcite
from fastcifar.optim.averaging import Buckets


@pytest.mark.parametrize(("method", "micro_batch"), [("plain", None), ("averages", 8), ("asam", None), ("muon", None)])
def test_training_is_that_of_autocast_to_the_bit(method, micro_batch, monkeypatch):
    config = replace(DROPOUT, **METHODS[method])
    config = replace(config, engine=replace(config.engine, micro_batch=micro_batch))
    autocast = run(Trainer(config, image_set(100)))
    monkeypatch.setattr(state, "shadow_dtype", lambda arch, device, dtype: dtype)
    shadowed = run(Trainer(config, image_set(100)))
    assert not autocast.state.shadow.weights
    assert len(shadowed.state.shadow.weights) == 8
    assert_same_weights(autocast, shadowed)


@pytest.mark.usefixtures("card", "deterministic")
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_captured_steps_with_a_shadow_are_those_of_autocast(precision, monkeypatch):
    config = replace(DROPOUT, engine=EngineConfig(device="cuda:0", precision=precision, compile="off"))
    shadowed = Trainer(config, image_set(100))
    monkeypatch.setattr(state, "shadow_dtype", lambda *_: torch.float32)
    autocast = Trainer(config, image_set(100))
    assert shadowed.capture() == autocast.capture() == 8
    assert shadowed.state.shadow.weights
    assert_same_weights(run(shadowed), run(autocast))


@pytest.mark.parametrize(
    ("arch", "device", "kept"), [("resnet20_v2", "cuda", True), ("resnet20_v2", "cpu", False), ("a.b:c", "cuda", False)]
)
def test_a_shadow_is_kept_on_a_gpu_for_own_networks(arch, device, kept):
    assert (shadow_dtype(arch, torch.device(device), torch.float16) == torch.float16) is kept


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3)
        self.tied = nn.Linear(4, 4)
        self.tie = nn.Linear(4, 4)
        self.tie.weight = self.tied.weight
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.gate = SqueezeExcite(4, 2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_only_what_autocast_casts_and_nothing_else_uses_is_kept():
    model = Odd()
    shadow = Shadow(model, Buckets(model).flat[0], torch.bfloat16)
    kept = "plain.weight", "plain.bias", "tied.bias", "tie.bias", "frozen.weight", "frozen.bias"
    assert set(shadow.weights) == set(kept)
    assert not shadow.weights["frozen.weight"].requires_grad
    for name, weight in shadow.weights.items():
        assert torch.equal(weight, model.get_parameter(name).bfloat16())
    with torch.no_grad():
        model.plain.weight.mul_(3)
    shadow.refresh()
    assert torch.equal(shadow.weights["plain.weight"], model.plain.weight.bfloat16())


def test_layouts_are_those_of_the_weights():
    model = build_model("resnet20_v2").to(memory_format=torch.channels_last)
    shadow = Shadow(model, Buckets(model).flat[0], torch.float16)
    for name, weight in shadow.weights.items():
        assert weight.stride() == model.get_parameter(name).stride()
        assert weight.data_ptr() % 16 == 0


def test_gradients_add_to_those_that_are_there():
    model = nn.Sequential(nn.Linear(3, 2))
    shadow = Shadow(model, Buckets(model).flat[0], torch.bfloat16)
    weight, _ = shadow.weights.values()
    (weight.float().sum() * 1.5).backward()
    shadow.deposit()
    (weight.float().sum() * 0.25).backward()
    shadow.deposit()
    assert torch.equal(model[0].weight.grad, torch.full((2, 3), 1.75))
    assert model[0].bias.grad is None
    assert weight.grad is None
