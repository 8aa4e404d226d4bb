from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastcifar.data.cache import cache_folder


def test_the_users_cache_or_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fastcifar"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    if sys.platform == "linux":
        assert cache_folder() == tmp_path / ".cache" / "fastcifar"
