"""The run folder: made whole or not at all, in the place asked for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_run import CONFIG

from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.runs import files
from fastcifar.runs.folder import Run


def test_runs_without_a_place_get_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {Run.create(None, CONFIG).path for _ in range(3)}
    assert len(paths) == 3
    assert {path.parent for path in paths} == {Path("runs")}
    assert all(path.name.startswith("resnet-") for path in paths)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match="exists already"):
        Run.create(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match="exists already"):
        Run.create(tmp_path / "mine.txt", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "name", ["file/run", "file/deep/run", "x" * 300], ids=["below a file", "deep below a file", "long"]
)
def test_a_place_that_cannot_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FastcifarError) as caught:
        Run.create(tmp_path / name, CONFIG)
    assert str(caught.value).startswith(f"{tmp_path / name} cannot be written (")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("there", [(), ("outer",), ("outer", "outer/run")], ids=repr)
def test_what_was_made_of_a_folder_is_gone_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...]
) -> None:
    for folder in there:
        (tmp_path / folder).mkdir()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FastcifarError, match="No space left on device"):
        Run.create(tmp_path / "outer" / "run", CONFIG)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == list(there)


HOLD = """
import sys, time
from pathlib import Path
from fastcifar.runs.folder import Run
with Run(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_trains_into_a_folder_and_a_dead_one_holds_it_no_more(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG)
    with subprocess.Popen([sys.executable, "-c", HOLD, run.path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FastcifarError, match="another process trains into"), run.locked():
            pass
        other.kill()
    with run.locked():
        assert run.config() == CONFIG


def test_a_lock_alone_does_not_take_a_folder(tmp_path: Path) -> None:
    with Run(tmp_path).locked():
        pass
    run = Run.create(tmp_path, CONFIG)
    assert (run.config(), run.result()) == (CONFIG, None)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"is no run: it has no config\.json"):
            Run.open(path)
