"""A data set, a run on it, and an ensemble of such runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import make_data, make_ensemble, make_run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path)


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    return make_run(tmp_path / "run", data)


@pytest.fixture
def ensemble(tmp_path: Path, data: Path) -> Path:
    return make_ensemble(tmp_path / "ensemble", data)
