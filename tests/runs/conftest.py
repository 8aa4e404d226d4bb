"""A run to read and to damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_run import make_run

from fastcifar.runs.folder import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")
