"""Fixtures and gates shared by all tests."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # the processes share the CPU; torch reads it once, when it is imported

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pretended_dali import dali  # noqa: F401
from pretended_gpu import gpu  # noqa: F401

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which a GPU asks for before it computes deterministically


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    no_gpu = None if torch.cuda.is_available() else "no CUDA device"
    folder = os.environ.get("FASTCIFAR_DATA")
    no_data = (
        None
        if folder and (Path(folder) / "cifar-10-batches-py").is_dir()
        else "FASTCIFAR_DATA names no folder with cifar-10-batches-py"
    )
    for item in items:
        for marker, reason in (("gpu", no_gpu), ("data", no_data)):
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def card(request: pytest.FixtureRequest) -> torch.device:
    """The GPU of this machine, or else the pretended one."""
    if not torch.cuda.is_available():
        request.getfixturevalue("gpu")
    return torch.device("cuda", 0)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Equal bits from equal runs, on a GPU too."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
