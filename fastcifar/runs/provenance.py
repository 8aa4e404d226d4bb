"""Which code made a run: the versions of its packages, and the commit of its checkout."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from pathlib import Path


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("fastcifar", "torch", "triton", "nvidia-dali-cuda130", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str | None:
    """Returns the git commit of the package's own checkout, marked -dirty where its files differ."""
    root = Path(__file__).resolve().parents[2]
    described = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        if (root / ".git").exists():
            return subprocess.run(described, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    return None
