"""PyramidNet against its definition, and the two factors of ShakeDrop."""

import pytest
import torch
from torch.nn import functional as F

from fastcifar.errors import ConfigError
from fastcifar.models import build_model
from fastcifar.models.pyramidnet import PyramidBlock, ShakeDrop, pyramidnet


def test_widths_grow_evenly_and_the_map_halves_twice():
    """The paper's formula for the width of the block k of n: 16 + alpha k / n, rounded."""
    with torch.device("meta"):
        network = pyramidnet(depth=29, alpha=50, shake_drop=0.0, classes=10, image_size=32)
        maps, x = [], torch.empty(1, 3, 32, 32)
        for name, layer in network.named_children():
            for block in layer if name.startswith("stage") else [layer]:
                x = block(x)
                maps.append(tuple(x.shape[1:]))
    sides = [32, 32, 32, 16, 16, 16, 8, 8, 8]
    assert maps[2:11] == [(4 * round(16 + 50 * k / 9), side, side) for k, side in enumerate(sides, 1)]


def test_a_block_by_hand():
    block = PyramidBlock(5, 3, 2, None).double().eval()
    for norm in (module for module in block.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)

    def norm(layer, x):
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    first, second, third, fourth, fifth = block.branch
    y = F.conv2d(norm(block.norm, x), first.weight)
    y = F.conv2d(F.relu(norm(second, y)), third.weight, stride=2, padding=1)
    y = norm(block.last_norm, F.conv2d(F.relu(norm(fourth, y)), fifth.weight))
    shortcut = torch.cat((F.avg_pool2d(x, 2), torch.zeros(2, 7, 4, 4)), 1)
    torch.testing.assert_close(block(x), y + shortcut)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_shake_drop_scales_value_and_gradient_apart(probability):
    layer, means = ShakeDrop(probability), []
    x = torch.ones(64, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert (y[:, 0] == y[:, 1]).all(), "one factor for each image"
        if (y != 1).any():
            assert -1 <= y.min() < -0.5 < 0.5 < y.max() <= 1
            assert 0 <= gradient.min() < 0.25 < 0.75 < gradient.max() <= 1
            assert abs(torch.corrcoef(torch.stack((y[:, 0, 0, 0], gradient[:, 0, 0, 0])))[0, 1]) < 0.6
        means.append(y.mean().item())
    assert sum(means) / 200 == pytest.approx(1 - probability, abs=0.12)
    torch.testing.assert_close(layer.eval()(x), x * (1 - probability))


def test_shake_drop_grows_to_the_last_block():
    with torch.device("meta"):
        network = build_model("pyramidnet272", shake_drop=0.5)
    found = [module.probability for module in network.modules() if isinstance(module, ShakeDrop)]
    assert found == pytest.approx([0.5 * k / 90 for k in range(1, 91)])
    with pytest.raises(ConfigError, match=r"shake_drop is 1.5; expected 0 to 1"):
        build_model("pyramidnet272", shake_drop=1.5)
