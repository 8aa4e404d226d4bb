"""Residual blocks: the order of their layers, changes of shape, and what is dropped."""

import pytest
import torch
from timm.layers import drop_path
from torch import nn

from fastcifar.models.blocks import BlockShape, Merge, Pool, PostActivation, PreActivation, StochasticDepth, Subsampling
from fastcifar.models.layers import BatchNorm2d

SAME = BlockShape(channels=(8, 8, 8), kernels=(3, 3))
WIDER = BlockShape(channels=(8, 12, 12), kernels=(3, 3), stride=2)


def test_pre_activation_block_follows_the_paper():
    """The shortcut is the identity where the shape stays, else a bare convolution of the activated input."""
    x = torch.randn(2, 8, 6, 6)
    for block in (PreActivation(SAME), PreActivation(WIDER)):
        conv1, norm2, conv2 = block.branch
        activated = torch.relu(normed(block.norm, x))
        branch = conv2(torch.relu(normed(norm2, conv1(activated))))
        shortcut = block.shortcut[0](activated) if block.projects else x
        torch.testing.assert_close(block(x), (branch, shortcut))
    assert [type(layer) for layer in block.shortcut] == [Subsampling]
    assert branch.shape == (2, 12, 3, 3)


@pytest.mark.parametrize(
    "follower", [PreActivation(SAME), PreActivation(WIDER), BatchNorm2d(8, relu=True), Pool(2)], ids=repr
)
def test_what_follows_a_pre_activation_block_adds_its_branch_and_shortcut(follower):
    """They agree to the bit, so that a network computes on a CPU what it would if the block added them itself."""
    branch, shortcut = PreActivation(SAME)(torch.randn(2, 8, 6, 6))
    torch.testing.assert_close(follower((branch, shortcut)), follower(branch + shortcut), rtol=0, atol=0)


def test_post_activation_block_follows_the_paper():
    x = torch.randn(2, 8, 6, 6)
    for block in (PostActivation(SAME), PostActivation(WIDER)):
        conv1, norm1, conv2 = block.branch
        branch = normed(block.norm, conv2(torch.relu(normed(norm1, conv1(x)))))
        shortcut = normed(block.shortcut[1], block.shortcut[0](x)) if len(block.shortcut) else x
        torch.testing.assert_close(block(x), torch.relu(branch + shortcut))
    assert block(x).shape == (2, 12, 3, 3)


def normed(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean((0, 2, 3), keepdim=True)
    scaled = centred / (centred.square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize(("kernel", "size", "pool_skip"), [(1, 5, True), (3, 8, False), (3, 15, True), (5, 15, False)])
def test_blocks_keep_and_halve_odd_maps(kernel, size, pool_skip):
    x = torch.randn(2, 4, size, size)
    same = BlockShape(channels=(4, 4, 4), kernels=(kernel, kernel), pool_skip=pool_skip)
    halved = BlockShape(channels=(4, 6, 6), kernels=(kernel, kernel), stride=2, skip_kernel=kernel, pool_skip=pool_skip)
    assert {y.shape for y in (*PreActivation(same)(x), PostActivation(same)(x))} == {x.shape}
    smaller = (2, 6, (size + 1) // 2, (size + 1) // 2)
    assert {tuple(y.shape) for y in (*PreActivation(halved)(x), PostActivation(halved)(x))} == {smaller}


def test_merge_gates_the_branch_then_adds():
    shape = BlockShape(channels=(8, 8, 8), kernels=(3, 3), reduced=2)
    merge, branch, shortcut = Merge(shape), torch.randn(3, 8, 5, 5), torch.randn(3, 8, 5, 5)
    excite = merge.excite
    gate = torch.sigmoid(excite.expand(torch.relu(excite.reduce(branch.mean((2, 3))))))
    gated = branch * gate[:, :, None, None]
    torch.testing.assert_close(merge(branch), gated)
    torch.testing.assert_close(merge(branch, shortcut), torch.relu(gated + shortcut))


@pytest.mark.parametrize("style", [PreActivation, PostActivation])
@pytest.mark.parametrize("reduced", [0, 2])
def test_stochastic_depth_leaves_the_shortcut_or_scales_the_branch(style, reduced):
    """It acts on each sample by itself, after the gate and before the addition."""
    block, passed = style(BlockShape(channels=(8, 8, 8), kernels=(3, 3), reduced=reduced, skip_probability=0.5)), []
    block.merge.depth.register_forward_hook(lambda module, inputs, output: passed.append((inputs[0], output)))
    x = torch.randn(64, 8, 4, 4)
    y = block(x)
    ((branch, dropped),) = passed
    alive = dropped.flatten(1).any(1)
    assert 12 < alive.sum() < 52
    torch.testing.assert_close(dropped, 2 * branch * alive[:, None, None, None])
    torch.testing.assert_close(y, torch.relu(dropped + x) if style is PostActivation else (dropped, x))


@pytest.mark.parametrize("probability", [0.1, 0.9])
def test_stochastic_depth_scales_as_timms(probability):
    """Each result is zero or the input over the kept share, as often as it should be (5 deviations)."""
    count, layer = 10_000, StochasticDepth(probability)
    x = torch.ones(count, 2, 1, 1)
    ours, theirs = layer(x), drop_path(x, probability, training=True)
    assert torch.equal(ours.unique(), theirs.unique())
    assert torch.equal(ours[:, 0], ours[:, 1])
    deviation = (probability * (1 - probability) / count) ** 0.5
    assert ((ours[:, 0] == 0).float().mean() - probability).abs() < 5 * deviation
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.eval()(x) is x
