"""Architectures by name; the map is torch-free, so that a wrong name or option is refused before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastcifar.errors import ConfigError, unknown
from fastcifar.registry import GIVEN, load

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Where an architecture is built, and what it lets the user choose."""

    summary: str
    """One line, shown by `fastcifar count`."""
    target: str
    """`module:function`; the function takes `classes`, `image_size`, the options and the preset by keyword; it
    returns an `nn.Module`.
    """
    options: tuple[str, ...]
    """The keyword options that the user may give, besides `classes` and `image_size`."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """What the function is told where the user gives nothing else."""


RESNET, WRN, RESNET_RS = (
    "fastcifar.models.resnet:resnet",
    "fastcifar.models.wide:wrn",
    "fastcifar.models.resnet_rs:resnetrs50",
)
PYTORCH = {"weight_init": "pytorch"}
"""The setting of what reports 1 and 4 took from github.com/kuangliu/pytorch-cifar, which leaves the weights as
PyTorch makes them.
"""
LAST = ("dropout", "stochastic_depth", "weight_init")
SE = ("se_ratio", *LAST)
V2 = ("final_norm", *SE)
POOLED = ("pool", "pool_stride", *SE)
RS = ("stem_channels", "stem_out", *SE)
SHAPE = (
    "blocks",
    "channels",
    "kernels",
    "skip_kernels",
    "stem_channels",
    "stem_stride",
    "block",
    "groups",
    "group_width",
)

ARCHITECTURES: dict[str, Architecture] = {
    "resnet": Architecture(
        "the generic residual network, ResNet-18 where nothing is given",
        RESNET,
        (*SHAPE, "pre_activation", *V2, *POOLED[:2]),
    ),
    "resnet18": Architecture("ResNet-18 for small images, the baseline of reports 4 and 5", RESNET, SE, PYTORCH),
    "resnet20": Architecture(
        "the ResNet-20 of report 5's table 1 (the ASAM authors': a convolution with norm where the shortcut changes "
        "shape)",
        RESNET,
        SE,
        {"blocks": (3, 3, 3), "channels": (16, 32, 64)},
    ),
    "resnet56": Architecture(
        "the ResNet-56 of report 5's table 1", RESNET, SE, {"blocks": (9, 9, 9), "channels": (16, 32, 64)}
    ),
    "resnet20_v2": Architecture(
        "report 1's ResNetV2-20, pre-activation",
        RESNET,
        V2,
        {"blocks": (3, 3, 3), "channels": (16, 32, 64), "pre_activation": True, **PYTORCH},
    ),
    "resnet_prop": Architecture(
        "report 1's ResNetV2-Prop, a pre-activation ResNet-18, with the last norm that the report's lacks "
        "(final_norm false)",
        RESNET,
        V2,
        # Without it the features add up unbounded: 78 steps up to a rate of 0.1 ended in NaN on the drawn images.
        {"pre_activation": True, "final_norm": True, **PYTORCH},
    ),
    "resnet_s3": Architecture(
        "report 3's network", RESNET, POOLED, {"blocks": (3, 3, 2, 3), "channels": (64, 128, 128, 256), "pool": 4}
    ),
    "resnet_s4": Architecture(
        "report 4's final network; its baseline has dropout 0 and pool 5, which reads the top left 5x5 of the 8x8 map",
        RESNET,
        POOLED,
        {"blocks": (4, 4, 3), "channels": (64, 128, 256), "dropout": 0.4, **PYTORCH},
    ),
    "resnet_s4_deep": Architecture(
        "report 4, table 8: three stages of 13 blocks",
        RESNET,
        POOLED,
        {"blocks": (13, 13, 13), "channels": (32, 64, 128), **PYTORCH},
    ),
    "resnet_s4_4stages": Architecture(
        "report 4, table 8: four stages",
        RESNET,
        POOLED,
        {"blocks": (4, 4, 3, 3), "channels": (32, 64, 128, 256), **PYTORCH},
    ),
    "resnet_s4_5stages": Architecture(
        "report 4, table 8: five stages",
        RESNET,
        POOLED,
        {"blocks": (4, 4, 4, 4, 3), "channels": (16, 32, 64, 128, 256), **PYTORCH},
    ),
    "resnetrs50": Architecture(
        "report 2's ResNet-RS-50, which takes 32x32 images to a 1x1 map; resnetrs50_cifar does not",
        RESNET_RS,
        ("stem_stride", *RS),
    ),
    "resnetrs50_cifar": Architecture(
        "ResNet-RS-50 with an unstrided stem: maps of 32, 16, 8 and 4 pixels",
        RESNET_RS,
        RS,
        {"stem_stride": 1, "entry_stride": 1},
    ),
    "resnext29": Architecture(
        "ResNeXt-29, 32x4d (Xie et al. 2017)",
        RESNET,
        ("groups", "group_width", *SE),
        {"blocks": (3, 3, 3), "channels": (64, 128, 256), "block": "bottleneck", "groups": 32, "group_width": 4},
    ),
    "wrn": Architecture(
        "a wide ResNet (Zagoruyko and Komodakis 2016); dropout is within its blocks", WRN, ("depth", "widen", *LAST)
    ),
    "wrn28_2": Architecture("WRN-28-2; dropout is within its blocks", WRN, LAST, {"depth": 28, "widen": 2}),
    "wrn28_10": Architecture("WRN-28-10; dropout is within its blocks", WRN, LAST, {"depth": 28, "widen": 10}),
}

TIMM = "timm"
PLUG_IN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""package.module:function"""


def find_architecture(name: str) -> Architecture:
    """The entry of `name`, which may also be `timm:NAME` or `package.module:function`; whether these exist is seen when
    they are built.

    Raises:
        ConfigError: no such name, or not of that form.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name.startswith(f"{TIMM}:") and name != f"{TIMM}:":
        summary = (
            "one of timm's networks, most of which have ImageNet stems: "
            "they shrink a 32x32 image before the first stage"
        )
        return Architecture(summary, "fastcifar.models.plug_ins:from_timm", (), {"name": name.removeprefix(f"{TIMM}:")})
    if name == GIVEN:
        return Architecture("a network that was given in Python", "fastcifar.models.plug_ins:from_nowhere", ())
    if PLUG_IN.fullmatch(name):
        return Architecture("a plug-in", "fastcifar.models.plug_ins:from_function", (), {"target": name})
    if ":" in name:
        raise ConfigError(
            f"architecture {name!r} is neither timm:NAME nor package.module:function; write it as one of them."
        )
    raise ConfigError(unknown("architecture", name, ARCHITECTURES))


def check_architecture(name: str, options: Mapping[str, Any]) -> Architecture:
    """The entry of `name`, after checking that it reads each of `options`.

    Raises:
        ConfigError: no such architecture, or one that does not read an option; the sentence names the valid ones.
    """
    architecture = find_architecture(name)
    for option in options:
        if option not in architecture.options:
            readers = [other for other, entry in ARCHITECTURES.items() if option in entry.options]
            own = f"its options are {', '.join(architecture.options)}" if architecture.options else "it reads none"
            hint = f"it is for {', '.join(readers)}" if readers else own
            raise ConfigError(f"{name} does not read the option {option!r}; {hint}.")
    return architecture


def build_model(name: str, *, classes: int = 10, image_size: int = 32, **options: Any) -> nn.Module:
    """The network `name`, freshly initialised from torch's global generator, on the CPU, in float32.

    Its input is (N, 3, image_size, image_size), normalised, best in channels_last; its output is the logits, (N,
    classes).

    Args:
        name: an architecture of `ARCHITECTURES`, or `timm:NAME`, or `package.module:function`.
        classes: number of classes.
        image_size: height and width of the images, in pixels.
        **options: what the architecture lets be chosen, such as `blocks=(3, 3, 2, 3)` for `resnet`.

    Raises:
        ConfigError: an unknown name, an option it does not read, or a value it cannot use.
    """
    architecture = check_architecture(name, options)
    return load(architecture.target)(classes=classes, image_size=image_size, **{**architecture.preset, **options})


def check_parameters(parameters: int, limit: float | None) -> None:
    """Raises ConfigError where a network has more `parameters` than the `limit`, if there is one."""
    if limit is not None and parameters > limit:
        raise ConfigError(
            f"the network has {parameters:,} parameters, above max_params {limit:,.0f}; choose a smaller one or "
            "raise the limit."
        )
