"""The folder of what fastcifar keeps for later runs: downloads, decoded pictures, compiled code."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/fastcifar``, or else the user's cache by the custom of the system."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fastcifar"
    from platformdirs import user_cache_path

    return user_cache_path("fastcifar", appauthor=False, opinion=False)
