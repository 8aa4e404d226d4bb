"""fastcifar: CIFAR-class networks trained at the speed of the hardware.

The names below are the public interface; each is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcifar.config import RunConfig
    from fastcifar.data.image_set import ImageSet
    from fastcifar.data.loader import Loader
    from fastcifar.data.sources import load_dataset
    from fastcifar.engine.run import resume, train
    from fastcifar.errors import FastcifarError
    from fastcifar.models import build_model
    from fastcifar.recipes import recipe
    from fastcifar.runs.folder import Result

__all__ = ["FastcifarError", "ImageSet", "Loader", "Result", "RunConfig", "build_model", "load_dataset", "recipe", "resume", "train"]

_HOMES = {
    "FastcifarError": "fastcifar.errors",
    "ImageSet": "fastcifar.data.image_set",
    "Loader": "fastcifar.data.loader",
    "Result": "fastcifar.runs.folder",
    "RunConfig": "fastcifar.config",
    "build_model": "fastcifar.models",
    "load_dataset": "fastcifar.data.sources",
    "recipe": "fastcifar.recipes",
    "resume": "fastcifar.engine.run",
    "train": "fastcifar.engine.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcifar' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
