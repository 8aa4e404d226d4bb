"""Networks from elsewhere: timm's, torchvision's and those that a user's function builds; free of torch until then."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastcifar.errors import ConfigError, reason, unknown

if TYPE_CHECKING:
    from torch import nn


def from_timm(*, name: str, classes: int = 10, image_size: int = 32) -> nn.Module:
    """timm's network `name`, untrained. Its input is (N, 3, image_size, image_size), its output (N, classes).

    Raises:
        ConfigError: timm is not installed or has no such network, or the network does not take images of that size.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"timm:{name} needs timm, which is not installed; run pip install timm.") from error
    if not timm.is_model(name):
        raise ConfigError(unknown("network of timm's", name, timm.list_models()))
    # Those made for one size, such as vision transformers, must be told another.
    fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    sized: dict[str, Any] = {"img_size": image_size} if fixed else {}
    with refused(f"timm:{name}", f"{image_size}x{image_size} images and {classes} classes"):
        return checked(timm.create_model(name, num_classes=classes, **sized), classes, image_size)


def from_torchvision(*, name: str, classes: int = 10, image_size: int = 32) -> nn.Module:
    """torchvision's network `name`, untrained. Its input is (N, 3, image_size, image_size), its output (N, classes).

    Raises:
        ConfigError: torchvision has no such network, or the network does not take images of that size.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigError(unknown("network of torchvision's", name, models.list_models(module=models)))
    # The vision transformers must be told the size; those with auxiliary heads would put out several logits.
    sized = {"image_size": image_size} if name.startswith("vit_") else {}
    single = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    with refused(f"torchvision:{name}", f"{image_size}x{image_size} images and {classes} classes"):
        network = models.get_model(name, weights=None, num_classes=classes, **sized, **single)
        return checked(network, classes, image_size)


def from_function(*, target: str, classes: int = 10, image_size: int = 32) -> nn.Module:
    """The network that `target`, a `package.module:function`, returns; the module may be in the current folder.

    The function is given `classes` (or `num_classes`) and `image_size` by keyword, where it takes them. The network's
    input is (N, 3, image_size, image_size), its output (N, classes).

    Raises:
        ConfigError: module or function are not there or fail, or what they return is no such network.
    """
    module_name, function_name = target.split(":")
    with current_folder_importable():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            what = f"{type(error).__name__}: {reason(error)}"
            raise ConfigError(
                f"{target}: the module {module_name} cannot be imported ({what}); mend it or its name."
            ) from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ConfigError(f"{target}: the module {module_name} has no function {function_name}; mend the name.")
        arguments = accepted(function, {"classes": classes, "num_classes": classes, "image_size": image_size})
        with refused(target, f"{image_size}x{image_size} images and {classes} classes"):
            return checked(function(**arguments), classes, image_size)


def from_nowhere(*, classes: int = 10, image_size: int = 32) -> nn.Module:
    """Raises ConfigError, since a network that was given in Python is known there alone."""
    raise ConfigError(
        "the network was given in Python and has no name to be built by; give it again in Python, as model=."
    )


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Within the block modules are looked for in the current folder first, as `python -m` does."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that `function` names as its own."""
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in arguments.items() if name in names}


@contextmanager
def refused(name: str, task: str) -> Iterator[None]:
    """Within the block any error becomes a ConfigError that says what `name` could not be built for."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name} {error}") from error
    except Exception as error:
        what = f"{type(error).__name__}: {reason(error)}"
        raise ConfigError(f"{name} failed for {task} ({what}); mend it or choose another architecture.") from error


def checked(network: Any, classes: int, image_size: int) -> nn.Module:
    """`network` itself, in training mode, after two images have gone through it in evaluation mode.

    Raises:
        ConfigError: no `nn.Module`, or not one that gives logits; the sentence lacks its subject.
    """
    import torch

    if not isinstance(network, torch.nn.Module):
        raise ConfigError(f"returned {type(network).__name__}; expected an nn.Module.")
    network.eval()
    with torch.no_grad():
        logits = network(torch.zeros(2, 3, image_size, image_size))
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(
            f"puts out {found} for two images; expected logits of shape (2, {classes}); a function takes classes=."
        )
    return network.train()
