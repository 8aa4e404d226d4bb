"""What the registries share: names map to `module:function`, imported only when asked for."""

import importlib
from typing import Any

GIVEN = "given"
"""What a run records as its network or its data set where that was given in Python, so that only Python can give it
again.
"""


def load(target: str) -> Any:
    """The object that `module:name` stands for."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
