"""The networks against torchvision's and timm's, with the same weights; pooling; compiling."""

import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
import torchvision
from copied_weights import assert_same_training_step, copy_weights
from timm.layers import get_attn
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastcifar.models import build_model
from fastcifar.models.blocks import StochasticDepth, convolution


@pytest.mark.parametrize(
    ("options", "block", "theirs"),
    [
        ({}, BasicBlock, {}),
        ({"block": "bottleneck"}, Bottleneck, {}),
        ({"block": "bottleneck", "groups": 4, "group_width": 8}, Bottleneck, {"groups": 4, "width_per_group": 8}),
    ],
    ids=["basic", "bottleneck", "grouped"],
)
def test_post_activation_network_equals_torchvisions(options, block, theirs):
    """The stem of torchvision's is swapped for a 3x3 one."""
    ours = build_model("resnet", blocks=(1, 2, 1, 1), classes=7, **options)
    theirs = torchvision.models.ResNet(block, [1, 2, 1, 1], num_classes=7, **theirs)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    copy_weights(ours, theirs)
    assert_same_training_step(ours, theirs, torch.randn(3, 3, 11, 11))


def timm_resnetrs50(stem_width: int) -> nn.Module:
    gate = partial(get_attn("se"), rd_ratio=1 / 16)
    return timm.create_model("resnetrs50", num_classes=10, stem_width=stem_width, block_args={"attn_layer": gate})


def test_resnet_rs_equals_timms():
    """At width 32 timm's first shortcut has a convolution too; the map is odd on all of its way but once."""
    ours, theirs = build_model("resnetrs50", dropout=0.0), timm_resnetrs50(32)
    copy_weights(ours, theirs)
    assert_same_training_step(ours, theirs, torch.randn(2, 3, 37, 37))


def test_wide_stem_of_resnet_rs_is_timms_but_for_one_shortcut():
    """Where the stem has the 256 channels of the stage, timm leaves the first shortcut bare; ours has layers.

    These are a convolution and a norm.
    """
    with torch.device("meta"):
        models = build_model("resnetrs50", stem_channels=128), timm_resnetrs50(128)
    ours, theirs = (sum(parameter.numel() for parameter in model.parameters()) for model in models)
    assert ours - theirs == 256 * 256 + 2 * 256


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("resnetrs50", {}, (8, 8, 4, 2, 1)),
        ("resnetrs50", {"stem_stride": 1}, (16, 16, 8, 4, 2)),
        ("resnetrs50_cifar", {}, (32, 32, 16, 8, 4)),
        ("wrn28_2", {}, (32, 32, 16, 8)),
        ("resnet_s3", {}, (32, 32, 16, 8, 4)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_sizes_of_the_maps(name, options, sizes):
    found = []
    with torch.device("meta"):
        model, x = build_model(name, **options), torch.empty(2, 3, 32, 32)
    for part_name, part in model.named_children():
        if part_name == "pool":
            break
        x = part(x)
        if part_name.startswith(("stem", "stage")) and part_name != "stem_norm":
            # A pre-activation block puts out two summands.
            found.append((x[0] if isinstance(x, tuple) else x).shape[-1])
    assert tuple(found) == sizes


TRAINING = """
import torch
from fastcifar.models import build_model

model = build_model("resnet", blocks=(1, 1), channels=(8, 16)).to(memory_format=torch.channels_last)
for _ in range(3):
    model(torch.randn(8, 3, 128, 128).to(memory_format=torch.channels_last)).sum().backward()
"""


def test_few_channels_and_large_images_train():
    """oneDNN's own gradient of the strided shortcut writes beyond its memory, which ends the process."""
    assert subprocess.run([sys.executable, "-c", TRAINING]).returncode == 0


@pytest.mark.parametrize("size", [16, 15])
def test_a_shortcut_of_few_channels_is_a_strided_convolution(size):
    ours, x = convolution(8, 16, kernel=1, stride=2), torch.randn(4, 8, size, size, requires_grad=True)
    results = [ours(x), F.conv2d(x, ours.weight, stride=2)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(y.square().sum(), (x, ours.weight)) for y in results]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_wide_resnet_drops_within_its_blocks():
    model = build_model("wrn", depth=10, widen=1, dropout=0.3)
    names = [type(layer).__name__ for layer in model.stage1[0].branch]
    assert names == ["Conv2d", "BatchNorm2d", "Dropout", "Conv2d"]
    assert "dropout" not in dict(model.named_children())
    assert "final_norm" in dict(model.named_children())


@pytest.mark.parametrize(
    ("pool", "stride", "side"), [(None, None, 1), (5, None, 1), (8, 1, 1), (4, None, 2), (3, 2, 3)]
)
def test_pool_window_and_stride_decide_the_features(pool, stride, side):
    with torch.device("meta"):
        model = build_model("resnet_s4", pool=pool, pool_stride=stride)
        assert model.classifier.in_features == 256 * side**2
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)


def test_stochastic_depth_grows_linearly_to_the_last_block():
    model = build_model("resnet", blocks=(1, 2, 1), channels=(8, 8, 8), stochastic_depth=0.4)
    found = [module.probability for module in model.modules() if isinstance(module, StochasticDepth)]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4])


PRE = {"blocks": (2, 1), "channels": (16, 32), "pre_activation": True, "stochastic_depth": 0.2, "dropout": 0.1}
GATED = {"blocks": (1, 1), "channels": (16, 16), "block": "bottleneck", "groups": 4, "se_ratio": 0.25}


@pytest.mark.slow
@pytest.mark.parametrize("options", [PRE, GATED], ids=["pre-activation", "gated"])
def test_compiles_whole(options):
    torch.compiler.reset()
    model = build_model("resnet", **options).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    compiled(images).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    torch.testing.assert_close(compiled(images), model(images), atol=1e-4, rtol=1e-4)
