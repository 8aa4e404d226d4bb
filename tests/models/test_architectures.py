"""The registry: exact parameter counts, every option read, and refusals."""

import pytest
import torch
from torch import nn

from fastcifar.errors import ConfigError
from fastcifar.models import ARCHITECTURES, build_model, check_architecture

VALUES = {
    "blocks": (1, 1, 1, 2),
    "channels": (32, 32, 64, 64),
    "kernels": (5,),
    "skip_kernels": (3,),
    "depth": 10,
    "widen": 3,
    "groups": 2,
    "group_width": 8,
    "stem_channels": 24,
    "stem_out": 48,
    "stem_stride": 1,
    "pool": 2,
    "pool_stride": 1,
    "block": "bottleneck",
    "pre_activation": True,
    "final_norm": True,
    "se_ratio": 0.5,
    "dropout": 0.3,
    "stochastic_depth": 0.2,
    "shake_drop": 0.5,
}
RS_BLOCK = 2 * 1024 * 256 + 9 * 256**2 + 2 * (256 + 256 + 1024) + 2 * 1024 * 64 + 64 + 1024
"""Parameters of a block of ResNet-RS's third stage: two 1x1 convolutions and a 3x3 one, their norms, and the gates."""
NEEDS = {
    "groups": {"block": "bottleneck"},
    "group_width": {"block": "bottleneck", "groups": 4},
    "stem_stride": {"stem_stride": 2},
    "pool_stride": {"pool": 2},
    "final_norm": {"pre_activation": True},
}
"""Options that an option of the generic network requires."""


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet18", {}, 11_173_962),
        ("resnet20", {}, 272_474),
        ("resnet56", {}, 855_770),
        ("resnet20_v2", {}, 272_154),
        ("resnet20_v2", {"final_norm": True}, 272_282),
        ("resnet_prop", {"final_norm": False}, 11_171_146),
        ("resnet_prop", {}, 11_172_170),
        ("resnet_s3", {}, 4_935_242),
        ("resnet_s4", {}, 4_697_162),
        ("resnet_s4_deep", {}, 4_959_770),
        ("resnet_s4_deep", {"stem_channels": 32}, 4_964_266),
        ("resnet_s4_4stages", {}, 4_458_794),
        ("resnet_s4_5stages", {}, 4_768_410),
        ("resnetrs50", {}, 26_115_738),
        ("resnetrs50", {"se_ratio": 0.25}, 33_663_402),
        ("resnetrs50_cifar", {}, 26_115_738),
        ("resnetrs101", {}, 26_115_738 + 17 * RS_BLOCK),
        ("resnetrs50", {"stem_channels": 128, "stem_out": 64}, 26_312_250),
        ("resnetrs50", {"stem_channels": 128}, 27_148_602),
        ("wrn28_2", {}, 1_467_610),
        ("wrn28_10", {}, 36_479_194),
        ("wrn", {"depth": 40, "widen": 4}, 8_949_210),
        ("resnext29", {"groups": 8, "group_width": 64}, 34_426_698),
        ("densenet121", {}, 6_956_298),
        ("vgg19_bn", {}, 20_040_522 - 5_504),
        ("pyramidnet272", {}, 26_210_842),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_parameter_counts_of_reports_and_papers(name, options, expected):
    assert parameters(on_meta(name, **options)) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_option_changes_the_network(name):
    for option in set(ARCHITECTURES[name].options) - {"weight_init"}:
        needs = NEEDS.get(option, {}) if name == "resnet" else {"pool": 2} if option == "pool_stride" else {}
        value = VALUES[option] if ARCHITECTURES[name].preset.get(option) is not True else False
        assert repr(on_meta(name, **{**needs, option: value})) != repr(on_meta(name, **needs)), option


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("resnet20", {}, "he"),
        ("resnet20", {"weight_init": "pytorch"}, "pytorch"),
        *((name, {}, "pytorch") for name in ("resnet18", "resnet20_v2", "resnet_s4_5stages")),
        ("wrn", {"depth": 10, "widen": 2, "weight_init": "he"}, "he"),
    ],
)
def test_convolutions_begin_as_their_source_has_them_or_as_asked(name, options, rule):
    """Compares the variance of the widest one, whose values are enough for a tolerance of 2%."""
    convolutions = [module for module in build_model(name, **options).modules() if isinstance(module, nn.Conv2d)]
    widest = max(convolutions, key=lambda module: module.weight.numel())
    fan_in, fan_out = widest.in_channels * 9, widest.out_channels * 9
    assert widest.weight.var().item() == pytest.approx(1 / (3 * fan_in) if rule == "pytorch" else 2 / fan_out, rel=0.02)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_other_classes_and_odd_sizes(name):
    with torch.device("meta"):
        assert build_model(name, classes=7, image_size=27)(torch.empty(2, 3, 27, 27)).shape == (2, 7)


def test_unknown_names_and_unread_options_name_the_valid_ones():
    with pytest.raises(ConfigError, match="did you mean resnet20_v2"):
        check_architecture("resnet20v2", {})
    with pytest.raises(ConfigError, match="resnet18 does not read the option 'blocks'; it is for resnet"):
        check_architecture("resnet18", {"blocks": (1,)})
    with pytest.raises(ConfigError, match="wrn28_2 does not read the option 'depth'; it is for wrn"):
        check_architecture("wrn28_2", {"depth": 16})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", {"blocks": (1, 1), "channels": (8,)}, "blocks names 2 stages and channels 1"),
        ("resnet", {"blocks": (1, 1), "channels": (8, 8), "kernels": (4,)}, "odd size"),
        ("resnet", {"blocks": (1, 1), "channels": (8, 8), "kernels": (3, 3, 3)}, "2 stages"),
        ("resnet", {"blocks": (0,), "channels": (8,)}, "at least 1"),
        ("resnet", {"blocks": (), "channels": ()}, "0 stages"),
        ("resnet", {"stem_channels": 0}, "at least 1"),
        ("resnet", {"blocks": (1,), "channels": (10**9,)}, "largest width or kernel is 1,000,000,000; expected"),
        ("resnet", {"blocks": (10**9,), "channels": (8,)}, "blocks add up to 1,000,000,000, and"),
        ("wrn", {"widen": 10**9}, "expected at most 10,000 and 1,000,000"),
        ("resnet", {"block": "dense"}, "unknown block 'dense'; choose one of basic, bottleneck"),
        ("resnet", {"final_norm": True}, "pre-activation"),
        ("resnet", {"dropout": 1.5}, "dropout 1.5 is not from 0"),
        ("resnet", {"stochastic_depth": 1.0}, "stochastic_depth 1.0 is not from 0"),
        ("resnet", {"se_ratio": -0.1}, "se_ratio -0.1 is not from 0"),
        ("resnet", {"pool": 9}, "last map of 4x4"),
        ("resnet", {"pool": 3, "stem_stride": 2}, "last map of 2x2"),
        ("resnet", {"pool": 0}, "pool is 0; expected 1 to 1000000"),
        ("resnet", {"stem_stride": 0}, "stem_stride is 0"),
        ("resnet", {"pool_stride": 1}, "pool_stride belongs to pool"),
        ("resnet", {"groups": 2}, "choose the block bottleneck"),
        ("resnet", {"groups": 3, "block": "bottleneck"}, "64 channels in stage 1 do not divide into 3 groups"),
        ("resnet", {"group_width": 4, "block": "bottleneck"}, "group_width belongs to groups"),
        ("resnetrs50", {"stem_out": 0}, "stem_out is 0"),
        ("wrn", {"depth": 27}, "give 6 n [+] 4, such as 16, 28 or 40"),
        ("wrn", {"depth": 4}, "depth 4 makes no wide ResNet"),
        ("wrn", {"widen": 0}, "widen is 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_values_that_make_no_network_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        on_meta(name, **options)
