"""A data set and a run on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import make_data, make_run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path)


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    return make_run(tmp_path / "run", data)
