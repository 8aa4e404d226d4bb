"""Weights kept in low precision, against autocast."""

from dataclasses import replace

import pytest
import torch
from small_training import DROPOUT, METHODS, image_set, run
from torch import Tensor, nn

from fastcifar.averaging import Buckets
from fastcifar.engine import trainer
from fastcifar.engine.shadow import Shadow
from fastcifar.engine.trainer import Trainer
from fastcifar.models import build_model
from fastcifar.models.layers import SqueezeExcite


class Autocast(Shadow):
    """Leaves all casts to autocast."""

    def __init__(self, model: nn.Module, flat: Tensor, _: torch.dtype) -> None:
        super().__init__(model, flat, torch.float32)


@pytest.mark.parametrize("micro_batch", [None, 8])
@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_of_autocast_to_the_bit(method, micro_batch, monkeypatch):
    config = replace(DROPOUT, **METHODS[method])
    config = replace(config, engine=replace(config.engine, micro_batch=micro_batch))
    shadowed = run(Trainer(config, image_set(100)))
    monkeypatch.setattr(trainer, "Shadow", Autocast)
    autocast = run(Trainer(config, image_set(100)))
    assert len(shadowed.shadow.weights) == 8
    assert not autocast.shadow.weights
    for a, b in zip(shadowed.buckets.flat, autocast.buckets.flat, strict=True):
        assert torch.equal(a, b)


class Odd(nn.Module):
    """Weights that are used in unusual ways beside one that is not."""

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
    assert set(shadow.weights) == {"plain.weight", "plain.bias", "tied.bias", "tie.bias", "frozen.weight", "frozen.bias"}
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
