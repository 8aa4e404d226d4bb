"""The network's settings, and architectures by name; torch is imported only when one is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from fastcifar.checks import check_range
from fastcifar.errors import ConfigError, unknown
from fastcifar.models.plug_ins import from_function, from_nowhere, from_timm, from_torchvision
from fastcifar.models.resnet import ResNet

if TYPE_CHECKING:
    from torch import nn

GIVEN = "given"
"""Recorded as the name of a network or data set that was given as a Python object, which only Python can give again."""
LIBRARIES = {"timm": from_timm, "torchvision": from_torchvision}
PLUG_IN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""Matches package.module:function."""
INSTALLED = re.compile(r"((timm|torchvision):)?\w[\w.-]*")
"""Matches the names that build from installed code alone: no other module is imported, and nothing is fetched."""


def of_resnet() -> Any:
    """A field of `ModelConfig` that is None where not given; its help and default stand with `ResNet`."""
    return field(default=None, metadata={"home": ResNet})


@dataclass(frozen=True)
class ModelConfig:
    """The network. What is left out is the architecture's own; what it does not read is refused."""

    arch: str = "resnet_prop"
    """Architecture: one of these names, timm:NAME, torchvision:NAME, or package.module:function; `fastcifar count
    --arch NAME` describes one.
    """
    depth: int | None = None
    """Convolutions and linear layers on the longest path of a wide ResNet, 6 n + 4 for n blocks a stage."""
    widen: int | None = None
    """Factor of the stages' width in a wide ResNet."""
    shake_drop: float | None = None
    """Probability of disturbing the last block's branch in a PyramidNet; in the others it grows towards it."""
    blocks: tuple[int, ...] | None = of_resnet()
    channels: tuple[int, ...] | None = of_resnet()
    kernels: tuple[int, ...] | None = of_resnet()
    skip_kernels: tuple[int, ...] | None = of_resnet()
    groups: int | None = of_resnet()
    group_width: int | None = of_resnet()
    stem_channels: int | None = of_resnet()
    stem_out: int | None = of_resnet()
    stem_stride: int | None = of_resnet()
    pool: int | None = of_resnet()
    pool_stride: int | None = of_resnet()
    block: Literal["basic", "bottleneck"] | None = of_resnet()
    # Not None, since the files of older runs have false for every network.
    pre_activation: bool = field(default=False, metadata={"home": ResNet})
    final_norm: bool | None = of_resnet()
    se_ratio: float | None = of_resnet()
    dropout: float | None = of_resnet()
    stochastic_depth: float | None = of_resnet()
    weight_init: Literal["he", "pytorch"] | None = of_resnet()
    max_params: float | None = None
    """Refuse a network of more parameters, such as 5e6."""

    def __post_init__(self) -> None:
        check_architecture(self.arch, self.options)
        check_range("max_params", self.max_params, 1)

    @property
    def options(self) -> dict[str, Any]:
        """The given options, as keyword arguments of `build_model`, without the name."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: value for name, value in given.items() if name not in ("arch", "max_params")}


def resnet(**options: Any) -> nn.Sequential:
    """The network that `ResNet(**options)` describes: normalised images (N, 3, H, W) -> logits (N, classes).

    Raises ConfigError where its values make none.
    """
    from fastcifar.models.blocks import assemble

    return assemble(ResNet(**options))


def wide_resnet(*, depth: int, widen: int, dropout: float = 0.0, **options: Any) -> nn.Sequential:
    """A wide ResNet (Zagoruyko and Komodakis 2016, arXiv:1605.07146): pre-activation, 16, 32 and 64 channels times
    `widen`, with dropout within its blocks, and 6 n + 4 layers for n blocks a stage.

    WRN-28-2 has 1,467,610 parameters for ten classes and WRN-28-10 36,479,194, as published.

    Raises:
        ConfigError: a depth of another form, or values that make no network.
    """
    if depth < 10 or depth % 6 != 4:
        raise ConfigError(f"depth {depth} makes no wide ResNet; give 6 n + 4, such as 16, 28 or 40.")
    check_range("widen", widen, 1)
    return resnet(
        blocks=(depth // 6,) * 3,
        channels=(16 * widen, 32 * widen, 64 * widen),
        stem_channels=16,
        pre_activation=True,
        final_norm=True,
        block_dropout=dropout,
        **options,
    )


def family(name: str) -> Callable[..., nn.Module]:
    """The function `name` of the module `name` of this package, which is imported when a network is built."""

    def build(**options: Any) -> nn.Module:
        return getattr(import_module(f"fastcifar.models.{name}"), name)(**options)

    return build


@dataclass(frozen=True)
class Architecture:
    """How an architecture is built, and which settings it reads."""

    summary: str
    """One line, shown by `fastcifar count`."""
    build: Callable[..., nn.Module]
    """The function that builds it; takes `classes`, `image_size`, the options and the preset by keyword."""
    options: tuple[str, ...] = ()
    """The fields of `ModelConfig` that it reads."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `build` that the user's options override."""


PYTORCH = {"weight_init": "pytorch"}
"""Weights initialised by PyTorch, as in the code behind reports 1 and 4, github.com/kuangliu/pytorch-cifar."""
LAST = ("dropout", "stochastic_depth", "weight_init")
SE = ("se_ratio", *LAST)
V2 = ("final_norm", *SE)
POOLED = ("pool", "pool_stride", *SE)
RS = ("stem_channels", "stem_out", *SE)
RESNETRS50 = {
    "blocks": (3, 4, 6, 3),
    "block": "bottleneck",
    "resnet_d": True,
    "stem_channels": 32,
    "se_ratio": 1 / 16,
    "dropout": 0.25,
}
"""ResNet-RS-50 (Bello et al. 2021, arXiv:2103.07579) as in report 2.

The report names the stem's width, 32 or 128, but gives no count of parameters. We read that as the width of the stem's
first two convolutions, and the third doubles it, as in public codes with such a setting. A strided 3x3 convolution of
that many channels replaces max-pooling, and the first block of every stage has a convolution on its shortcut, as in the
authors' code. For ten classes that is 26,115,738 parameters at width 32 and 27,148,602 at width 128; at width 128 with
`stem_out=64`, the stem's output in report 2's figure 1, it is 26,312,250. The inner width of squeeze-and-excitation is
1/16 of the features in report 2, and 0.25 in the paper. At strides of 2 the maps of a 32x32 image are 8, 4, 2 and 1
pixels wide; at 1, 32, 16, 8 and 4.
"""


def stages(blocks: tuple[int, ...], channels: tuple[int, ...], **others: Any) -> dict[str, Any]:
    return {"blocks": blocks, "channels": channels, **others}


ARCHITECTURES: dict[str, Architecture] = {
    "resnet": Architecture(
        "the generic residual network, ResNet-18 where nothing is given",
        resnet,
        tuple(f.name for f in fields(ModelConfig) if f.metadata and f.name != "stem_out"),
    ),
    "resnet18": Architecture("ResNet-18 for small images, the baseline of reports 4 and 5", resnet, SE, PYTORCH),
    "resnet20": Architecture(
        "the ResNet-20 of report 5's table 1 (the ASAM authors': a convolution with norm where the shortcut changes "
        "shape)",
        resnet,
        SE,
        stages((3, 3, 3), (16, 32, 64)),
    ),
    "resnet56": Architecture("the ResNet-56 of report 5's table 1", resnet, SE, stages((9, 9, 9), (16, 32, 64))),
    "resnet20_v2": Architecture(
        "report 1's ResNetV2-20, pre-activation",
        resnet,
        V2,
        stages((3, 3, 3), (16, 32, 64), pre_activation=True, **PYTORCH),
    ),
    "resnet_prop": Architecture(
        "report 1's ResNetV2-Prop, a pre-activation ResNet-18, with the last norm that the report's lacks "
        "(final_norm false)",
        resnet,
        V2,
        # Without the norm features grow unbounded: 78 steps up to a rate of 0.1 ended in NaN on the synthetic images.
        {"pre_activation": True, "final_norm": True, **PYTORCH},
    ),
    "resnet_s3": Architecture("report 3's network", resnet, POOLED, stages((3, 3, 2, 3), (64, 128, 128, 256), pool=4)),
    "resnet_s4": Architecture(
        "report 4's final network; its baseline has dropout 0 and pool 5, which reads the top left 5x5 of the 8x8 map",
        resnet,
        POOLED,
        stages((4, 4, 3), (64, 128, 256), dropout=0.4, **PYTORCH),
    ),
    "resnet_s4_deep": Architecture(
        "report 4, table 8: three stages of 13 blocks, with the stem of its code; its text reads as stem_channels 32",
        resnet,
        ("stem_channels", *POOLED),
        stages((13, 13, 13), (32, 64, 128), stem_channels=16, **PYTORCH),
    ),
    "resnet_s4_4stages": Architecture(
        "report 4, table 8: four stages", resnet, POOLED, stages((4, 4, 3, 3), (32, 64, 128, 256), **PYTORCH)
    ),
    "resnet_s4_5stages": Architecture(
        "report 4, table 8: five stages", resnet, POOLED, stages((4, 4, 4, 4, 3), (16, 32, 64, 128, 256), **PYTORCH)
    ),
    "resnetrs50": Architecture(
        "report 2's ResNet-RS-50, which takes 32x32 images to a 1x1 map; resnetrs50_cifar does not",
        resnet,
        ("stem_stride", *RS),
        {**RESNETRS50, "stem_stride": 2, "entry_stride": 2},
    ),
    "resnetrs101": Architecture(
        "report 2's ResNet-RS-101",
        resnet,
        ("stem_stride", *RS),
        {**RESNETRS50, "blocks": (3, 4, 23, 3), "stem_stride": 2, "entry_stride": 2},
    ),
    "resnetrs50_cifar": Architecture(
        "ResNet-RS-50 with an unstrided stem: maps of 32, 16, 8 and 4 pixels", resnet, RS, RESNETRS50
    ),
    "resnext29": Architecture(
        "ResNeXt-29, 32x4d (Xie et al. 2017)",
        resnet,
        ("groups", "group_width", *SE),
        stages((3, 3, 3), (64, 128, 256), block="bottleneck", groups=32, group_width=4),
    ),
    "wrn": Architecture(
        "a wide ResNet (Zagoruyko and Komodakis 2016); dropout is within its blocks",
        wide_resnet,
        ("depth", "widen", *LAST),
        {"depth": 28, "widen": 10},
    ),
    "wrn28_2": Architecture("WRN-28-2; dropout is within its blocks", wide_resnet, LAST, {"depth": 28, "widen": 2}),
    "wrn28_10": Architecture("WRN-28-10; dropout is within its blocks", wide_resnet, LAST, {"depth": 28, "widen": 10}),
    "densenet121": Architecture(
        "DenseNet-121 with a 3x3 stem (Huang et al. 2017)",
        family("densenet"),
        preset={"blocks": (6, 12, 24, 16), "growth": 32},
    ),
    "vgg19_bn": Architecture(
        "VGG19 with norms and one linear layer (Simonyan and Zisserman 2015)",
        family("vgg"),
        preset={"depths": (2, 2, 4, 4, 4)},
    ),
    "pyramidnet272": Architecture(
        "PyramidNet-272 of bottlenecks, alpha 200 (Han et al. 2017)",
        family("pyramidnet"),
        ("shake_drop",),
        {"depth": 272, "alpha": 200, "shake_drop": 0.0},
    ),
}


def find_architecture(name: str) -> Architecture:
    """Finds an architecture by its name; one from a library, or a plug-in, may still fail when it is built.

    Raises:
        ConfigError: no such name, or not of that form.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    library, _, network = name.partition(":")
    if library in LIBRARIES and network:
        stems = "most of which have ImageNet stems: they shrink a 32x32 image before the first stage"
        return Architecture(f"one of {library}'s networks, {stems}", LIBRARIES[library], preset={"name": network})
    if name == GIVEN:
        return Architecture("a network that was given in Python", from_nowhere)
    if PLUG_IN.fullmatch(name):
        return Architecture("a plug-in", from_function, preset={"target": name})
    if ":" in name:
        raise ConfigError(
            f"architecture {name!r} is neither timm:NAME, torchvision:NAME nor package.module:function; write "
            "it as one of them."
        )
    raise ConfigError(unknown("architecture", name, ARCHITECTURES))


def check_architecture(name: str, options: Mapping[str, Any]) -> Architecture:
    """Finds an architecture, and checks that it reads each of `options`.

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


def check_trusted(name: str, place: object, trust: bool) -> None:
    """Raises ConfigError where the architecture `name`, read from a file at `place`, is code that is not trusted."""
    if not trust and not INSTALLED.fullmatch(name):
        raise ConfigError(
            f"{place}'s network is built by {name!r}, code that would be executed; add --trust where you know it."
        )


def build_model(name: str, *, classes: int = 10, image_size: int = 32, **options: Any) -> nn.Module:
    """Builds the network `name` on the CPU in float32, initialised from torch's global generator.

    Its input is (N, 3, image_size, image_size), normalised, best in channels_last; its output is the logits, (N,
    classes).

    Args:
        name: an architecture of `ARCHITECTURES`, `timm:NAME`, `torchvision:NAME` or `package.module:function`.
        image_size: height and width of the images, in pixels.
        **options: what the architecture lets be chosen, such as `blocks=(3, 3, 2, 3)` for `resnet`.

    Raises:
        ConfigError: an unknown name, an option it does not read, or a value it cannot use.
    """
    architecture = check_architecture(name, options)
    return architecture.build(classes=classes, image_size=image_size, **{**architecture.preset, **options})


def check_parameters(parameters: int, limit: float | None) -> None:
    if limit is not None and parameters > limit:
        raise ConfigError(
            f"the network has {parameters:,} parameters, above max_params {limit:,.0f}; choose a smaller one or "
            "raise the limit."
        )
