"""Parameter counts against the reports, structure against torchvision and timm, and refusals."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastcifar.errors import ConfigError
from fastcifar.models import ARCHITECTURES, build_model, check_architecture
from fastcifar.models.blocks import BatchNorm2d, PostActivation, PreActivation
from fastcifar.models.count import count_network
from fastcifar.registry import load


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet20_v2", {}, 272_154),
        ("resnet20_v2", {"final_norm": True}, 272_282),
        ("resnet_prop", {}, 11_171_146),
        ("resnet_prop", {"final_norm": True}, 11_172_170),
        ("resnet18", {}, 11_173_962),
        ("resnet", {"blocks": (3, 3, 2, 3), "channels": (64, 128, 128, 256), "pool": 4}, 4_935_242),
        ("resnet", {"blocks": (4, 4, 3), "channels": (64, 128, 256), "dropout": 0.4}, 4_697_162),
        ("resnet", {"blocks": (13, 13, 13), "channels": (32, 64, 128)}, 4_964_266),
        ("resnet", {"blocks": (4, 4, 3, 3), "channels": (32, 64, 128, 256)}, 4_458_794),
        ("resnet", {"blocks": (4, 4, 4, 4, 3), "channels": (16, 32, 64, 128, 256)}, 4_768_410),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_parameter_counts_of_the_reports(name, options, expected):
    with torch.device("meta"):
        model = build_model(name, **options)
    assert parameters(model) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_registered_name_and_options_are_the_functions_own(name):
    function = load(ARCHITECTURES[name].target)
    assert function.__name__ == name
    assert set(function.__kwdefaults__) == {*ARCHITECTURES[name].options, "classes", "image_size"}


@pytest.mark.parametrize(("block", "torchvision_block"), [("basic", BasicBlock), ("bottleneck", Bottleneck)])
def test_post_activation_network_equals_torchvisions(block, torchvision_block):
    """torchvision's network, with its stem swapped for a 3x3 one, puts out the same with the same weights."""
    ours = build_model("resnet", blocks=(2, 1, 2, 1), channels=(64, 128, 256, 512), block=block, classes=7).eval()
    theirs = torchvision.models.ResNet(torchvision_block, [2, 1, 2, 1], num_classes=7)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    randomise_statistics(theirs)
    for (_, target), (_, source) in zip(ordered(ours), ordered(theirs.eval()), strict=True):
        target.load_state_dict({key: value for key, value in source.state_dict().items() if key != "num_batches_tracked"})
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))


def ordered(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]


def randomise_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)


def test_pre_activation_block_follows_the_paper():
    """Identity where the shape stays; a bare convolution of the activated input where it changes."""
    x = torch.randn(2, 8, 6, 6)
    same = PreActivation((8, 8, 8), (3, 3), 1, 0, 1)
    conv1, norm2, _, conv2 = same.branch
    activated = torch.relu(same.norm(x))
    torch.testing.assert_close(same(x), x + conv2(torch.relu(norm2(conv1(activated)))))
    assert same.shortcut is None

    wider = PreActivation((8, 12, 12), (3, 3), 2, 0, 1)
    assert isinstance(wider.shortcut, nn.Conv2d)
    assert wider.shortcut.bias is None
    assert wider(x).shape == (2, 12, 3, 3)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("size", [5, 8, 15])
def test_blocks_keep_and_halve_odd_maps(kernel, size):
    x = torch.randn(2, 4, size, size)
    for block in (PreActivation, PostActivation):
        assert block((4, 4, 4), (kernel, kernel), 1, 0, 1)(x).shape == x.shape
        assert block((4, 6, 6), (kernel, kernel), 2, 0, kernel)(x).shape == (2, 6, (size + 1) // 2, (size + 1) // 2)


@pytest.mark.parametrize(("pool", "features"), [(None, 256), (4, 256 * 4), (5, 256), (8, 256)])
def test_pool_window_decides_the_features(pool, features):
    model = build_model("resnet", blocks=(1, 1, 1), channels=(16, 32, 256), pool=pool)
    assert model.classifier.in_features == features
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_odd_image_sizes_and_class_counts():
    assert build_model("resnet20_v2", classes=100, image_size=27)(torch.randn(2, 3, 27, 27)).shape == (2, 100)


def test_batch_norm_equals_torchs_without_the_counter():
    ours, theirs = BatchNorm2d(5), nn.BatchNorm2d(5)
    for _ in range(3):
        x = torch.randn(4, 5, 3, 3)
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
    assert set(theirs.state_dict()) - set(ours.state_dict()) == {"num_batches_tracked"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (1, 1), "channels": (8,)}, "blocks names 2 stages and channels 1"),
        ({"blocks": (1, 1), "channels": (8, 8), "kernels": (4,)}, "odd size"),
        ({"blocks": (1, 1), "channels": (8, 8), "kernels": (3, 3, 3)}, "2 stages"),
        ({"blocks": (0,), "channels": (8,)}, "at least 1"),
        ({"block": "dense"}, "basic, bottleneck"),
        ({"final_norm": True}, "pre-activation"),
        ({"dropout": 1.5}, "dropout"),
        ({"pool": 9}, "last map of 4x4"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_values_that_make_no_network_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_model("resnet", **options)


def test_unknown_names_and_unread_options_name_the_valid_ones():
    with pytest.raises(ConfigError, match="did you mean resnet20_v2"):
        check_architecture("resnet20v2", {})
    with pytest.raises(ConfigError, match="resnet18 does not read the option 'blocks'; it is for resnet"):
        check_architecture("resnet18", {"blocks": (1,)})


@pytest.mark.parametrize(("name", "training_gflop"), [("resnet20_v2", 0.244), ("resnet_prop", 3.33), ("resnet18", 3.33)])
def test_flops_agree_with_the_closed_formula(name, training_gflop):
    count = count_network(name)
    assert count.training_flops / 1e9 == pytest.approx(training_gflop, rel=2e-3)
    assert sum(layer.parameters for layer in count.layers) == count.parameters
    assert sum(layer.flops for layer in count.layers) == count.forward_flops
    stem = count.layers[0]
    assert stem.flops == 2 * 32 * 32 * 27 * stem.output[0]
