"""Fixtures and gates shared by all tests."""

from __future__ import annotations

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:
    # The processes share the CPU; torch reads this once, when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pretended_dali import dali  # noqa: F401
from pretended_gpu import gpu  # noqa: F401

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which a GPU asks for before it computes deterministically


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips, with the reason, what this machine cannot run; a dry run of `tools/gpu_suite` pretends that it can."""
    folder = os.environ.get("FASTCIFAR_DATA")
    has_data = folder is not None and (Path(folder) / "cifar-10-batches-py").is_dir()
    has_gpu = torch.cuda.is_available() or config.getoption("dry_run", False)
    for item in items:
        if not has_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if not has_data and item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason="FASTCIFAR_DATA names no folder with cifar-10-batches-py"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Has coverage, where it measures, tell the tests with a GPU from the others, for `tools/cuda_coverage`."""
    measuring = sys.modules["coverage"].Coverage.current() if "coverage" in sys.modules else None
    if measuring:
        measuring.switch_context("gpu" if {"gpu", "dali", "card"} & set(item.fixturenames) else "cpu")


@pytest.fixture
def card(request: pytest.FixtureRequest) -> torch.device:
    if not torch.cuda.is_available():
        request.getfixturevalue("gpu")
    return torch.device("cuda", 0)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
