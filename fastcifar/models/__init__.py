"""Architectures by name; the map is torch-free, so that a wrong name or option is refused before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastcifar.errors import ConfigError, unknown
from fastcifar.registry import load

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Where an architecture is built, and what it lets the user choose."""

    target: str
    """`module:function`; the function takes `classes`, `image_size` and the options, all by keyword, and returns an `nn.Module`."""
    options: tuple[str, ...]
    """The keyword options that the function reads, besides `classes` and `image_size`."""


PRESET = ("dropout",)
GENERIC = ("blocks", "channels", "kernels", "skip_kernels", "stem_channels", "pool", "block", "pre_activation", "final_norm", "dropout")

ARCHITECTURES: dict[str, Architecture] = {
    "resnet": Architecture("fastcifar.models.resnet:resnet", GENERIC),
    "resnet18": Architecture("fastcifar.models.resnet:resnet18", PRESET),
    "resnet20_v2": Architecture("fastcifar.models.resnet:resnet20_v2", ("final_norm", *PRESET)),
    "resnet_prop": Architecture("fastcifar.models.resnet:resnet_prop", ("final_norm", *PRESET)),
}


def check_architecture(name: str, options: dict[str, Any]) -> Architecture:
    """The entry of `name`, after checking that it reads each of `options`.

    Raises:
        ConfigError: no such architecture, or one that does not read an option; the sentence names the valid ones.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(unknown("architecture", name, ARCHITECTURES))
    architecture = ARCHITECTURES[name]
    for option in options:
        if option not in architecture.options:
            readers = [other for other, entry in ARCHITECTURES.items() if option in entry.options]
            hint = f"it is for {', '.join(readers)}" if readers else f"its options are {', '.join(architecture.options)}"
            raise ConfigError(f"{name} does not read the option {option!r}; {hint}.")
    return architecture


def build_model(name: str, *, classes: int = 10, image_size: int = 32, **options: Any) -> nn.Module:
    """The network `name`, freshly initialised from torch's global generator, on the CPU, in float32.

    Its input is (N, 3, image_size, image_size), normalised, best in channels_last; its output is the logits, (N, classes).

    Args:
        name: an architecture of `ARCHITECTURES`.
        classes: number of classes.
        image_size: height and width of the images, in pixels.
        **options: what the architecture lets be chosen, such as `blocks=(3, 3, 2, 3)` for `resnet`.

    Raises:
        ConfigError: an unknown name, an option it does not read, or a value it cannot use.
    """
    build = load(check_architecture(name, options).target)
    return build(classes=classes, image_size=image_size, **options)
