"""Fixtures and gates shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    no_gpu = None if torch.cuda.is_available() else "no CUDA device"
    folder = os.environ.get("FASTCIFAR_DATA")
    no_data = (
        None if folder and (Path(folder) / "cifar-10-batches-py").is_dir() else "FASTCIFAR_DATA names no folder with cifar-10-batches-py"
    )
    for item in items:
        for marker, reason in (("gpu", no_gpu), ("data", no_data)):
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
