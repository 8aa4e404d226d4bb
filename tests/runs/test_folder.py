"""The run folder: made whole or not at all, in the place asked for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_run import CONFIG, RESULT

from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.runs import files
from fastcifar.runs.ensembles import is_ensemble
from fastcifar.runs.folder import Run, check_free


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
    assert str(caught.value).startswith(f"{tmp_path / name} cannot be ")
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
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"is no run: it has no config\.json"):
            Run.open(path)


def test_what_cannot_be_read_is_not_taken_for_absent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "lstat", denied)
    for read in (lambda: Run.open(run.path), run.result, lambda: check_free(run.path), lambda: is_ensemble(run.path)):
        with pytest.raises(FastcifarError, match=r"cannot be read \(Permission denied\); "):
            read()


def test_a_run_that_was_killed_in_its_first_write_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.partial").write_text("{")
    assert Run.create(tmp_path, CONFIG).config() == CONFIG
    assert {path.name for path in tmp_path.iterdir()} <= {".lock", "config.json"}


def test_names_from_a_file_do_not_lead_out_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("../../elsewhere", "/elsewhere", "elsewhere\n/.."):
        path = Run.create(None, replace(CONFIG, recipe=name)).path
        assert path.parent == Path("runs")
        assert path.name.startswith("elsewhere-")


def test_links_in_a_run_lead_nowhere(run: Run, tmp_path: Path) -> None:
    """What a link leads to stays as it is; where a file is replaced, so is the link."""
    (outside := tmp_path / "outside").write_text("mine")
    for name in ("config.json", "result.json", "curves.png"):
        for place in (run.path / name, run.path / f".{name}.partial"):
            place.unlink(missing_ok=True)
            place.symlink_to(outside)
    run.write_config(CONFIG)
    run.write_result(RESULT)
    files.write_text(run.path / "curves.png", "picture")
    run.sweep()
    assert (run.config(), run.result()) == (CONFIG, RESULT)
    (run.path / ".lock").unlink(missing_ok=True)
    (run.path / ".lock").symlink_to(outside)
    with pytest.raises(FastcifarError, match="is a link"), run.locked():
        pass
    assert outside.read_text() == "mine"
    assert [path.name for path in run.path.iterdir() if path.is_symlink()] == [".lock"]
