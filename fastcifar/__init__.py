"""fastcifar: CIFAR-class networks trained at the speed of the hardware.

The names below are the public interface; each is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcifar.api import evaluate, export, predict, resume, train
    from fastcifar.config import RunConfig
    from fastcifar.data.image_set import ImageSet
    from fastcifar.data.loader import Loader
    from fastcifar.data.sources import load_dataset
    from fastcifar.errors import FastcifarError
    from fastcifar.models import build_model
    from fastcifar.recipes import recipe
    from fastcifar.runs.folder import Result

    __version__: str

_HOMES = {
    "FastcifarError": "fastcifar.errors",
    "ImageSet": "fastcifar.data.image_set",
    "Loader": "fastcifar.data.loader",
    "Result": "fastcifar.runs.folder",
    "RunConfig": "fastcifar.config",
    "build_model": "fastcifar.models",
    "evaluate": "fastcifar.api",
    "export": "fastcifar.api",
    "load_dataset": "fastcifar.data.sources",
    "predict": "fastcifar.api",
    "recipe": "fastcifar.recipes",
    "resume": "fastcifar.api",
    "train": "fastcifar.api",
}
__all__ = [
    "FastcifarError",
    "ImageSet",
    "Loader",
    "Result",
    "RunConfig",
    "__version__",
    "build_model",
    "evaluate",
    "export",
    "load_dataset",
    "predict",
    "recipe",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("fastcifar")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcifar' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
