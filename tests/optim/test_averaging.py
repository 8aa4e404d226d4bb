"""Averages of the weights against `torch.optim.swa_utils` and a plain loop."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from fastcifar.config import AverageConfig
from fastcifar.errors import ConfigError
from fastcifar.models import build_model
from fastcifar.optim.averaging import SWA, Averages, Buckets, estimate_statistics

EPOCHS, STEPS = 6, 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet", blocks=(1,), channels=(6,), classes=3, image_size=8).to(
        memory_format=torch.channels_last
    )


def walk(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(0.1 * torch.randn(tensor.shape))


def weights_of(buckets: Buckets, model: nn.Module, flat) -> dict[str, torch.Tensor]:
    with buckets.holding(flat):
        return copy.deepcopy(model.state_dict())


def test_ema_of_several_decays_equals_torchs():
    """Each average is warmed up; the model has buffers."""
    decays = (0.5, 0.9, 0.999)
    model = network()
    buckets = Buckets(model)
    averages = Averages(buckets, AverageConfig(decays), STEPS, EPOCHS)
    theirs = [copy.deepcopy(model) for _ in decays]
    for step in range(STEPS * EPOCHS):
        walk(model)
        averages.update(averages.decays[step])
        for decay, average in zip(decays, theirs, strict=True):
            warm = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
            warm(list(average.state_dict().values()), list(model.state_dict().values()), step)
    assert list(averages.flat) == ["ema-0.5", "ema-0.9", "ema-0.999"]
    for flat, average in zip(averages.flat.values(), theirs, strict=True):
        torch.testing.assert_close(weights_of(buckets, model, flat), dict(average.state_dict()))


@pytest.mark.parametrize(("start", "first"), [("50%", EPOCHS // 2 + 1), ("8st", 3)])
def test_swa_equals_torchs(start, first):
    """It begins at the end of epoch `first`; statistics are measured anew over the training set, as by `update_bn`."""
    model = network()
    buckets = Buckets(model)
    averages = Averages(buckets, AverageConfig((0,), swa_start=start), STEPS, EPOCHS)
    theirs = AveragedModel(with_counters(model))
    for epoch in range(1, EPOCHS + 1):
        for _ in range(STEPS):
            walk(model)
        averages.end_epoch(epoch)
        if epoch >= first:
            theirs.update_parameters(with_counters(model))
    batches = [torch.randn(5, 3, 8, 8) for _ in range(4)]
    averages.estimate_statistics(model.train(), model, batches)
    update_bn(batches, theirs.train())
    ours = weights_of(buckets, model, averages.flat[SWA])
    expected = {name: tensor for name, tensor in theirs.module.state_dict().items() if "num_batches" not in name}
    torch.testing.assert_close(ours, expected)


def with_counters(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = torch.tensor(0)
    return twin


def test_estimating_statistics_keeps_momentum_and_weights():
    model = network().train()
    before = [parameter.clone() for parameter in model.parameters()]
    estimate_statistics(model, model, [torch.randn(2, 3, 8, 8)])
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_integer_buffers_stay_where_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    counter = model[1].num_batches_tracked
    Averages(Buckets(model), AverageConfig(), 2, 2).update(torch.tensor([0.5]))
    model(torch.randn(2, 3, 8, 8))
    assert model[1].num_batches_tracked is counter
    assert counter == 1


def test_weights_that_are_not_float32_are_refused():
    with pytest.raises(ConfigError, match=r"weights of type torch\.float64; expected float32"):
        Buckets(nn.Linear(2, 2).double())


@pytest.mark.parametrize("start", ["6ep", "17st"])
def test_swa_that_averages_nothing_is_refused(start):
    with pytest.raises(ConfigError, match="leaves no epoch to average"):
        Averages(Buckets(network()), AverageConfig((0,), swa_start=start), STEPS, EPOCHS)


@pytest.mark.parametrize("decays", [(0.9, 0.9), (0.9999999, 0.99999999), (0.1, 0.2, 0.3, 0.4, 0.5), (1.5,)])
def test_decays_that_do_not_suit_are_refused(decays):
    with pytest.raises(ConfigError):
        AverageConfig(decays)
