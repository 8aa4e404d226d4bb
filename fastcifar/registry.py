"""What the registries share: names map to `module:function`, imported only when asked for."""

import importlib
from typing import Any


def load(target: str) -> Any:
    """The object that `module:name` stands for."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
