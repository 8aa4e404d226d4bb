"""The cache folder for downloads, decoded pictures and compiled code."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/fastcifar``, or else the system's usual cache folder of the user."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fastcifar"
    from platformdirs import user_cache_path

    return user_cache_path("fastcifar", appauthor=False, opinion=False)
