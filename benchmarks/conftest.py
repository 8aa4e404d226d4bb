"""What the benchmarks share: the device, the data, the physical limit."""

from __future__ import annotations

import sys

import pytest
import torch

from fastcifar.data.image_set import ImageSet
from fastcifar.data.synthetic import synthetic
from fastcifar.device import resolve_device
from fastcifar.diagnostics.profile import copy_bytes_per_second

collect_ignore = [] if "suite_plugin" in sys.modules else ["gpu"]
"""The tests of `tools/gpu_suite`, which brings the plugin that they need, are not collected without it."""


@pytest.fixture
def device() -> torch.device:
    return resolve_device("auto")


@pytest.fixture(scope="session")
def images() -> ImageSet:
    """Returns 10,000 images of 32x32; what they show does not matter to any speed here."""
    return synthetic("train")


@pytest.fixture
def copy_bandwidth(device: torch.device) -> float:
    """Measures the bytes read and written a second by a large copy: the limit of work that only moves memory."""
    return copy_bytes_per_second(device)
