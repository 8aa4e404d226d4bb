"""`tools/gpu_suite` in small on the pretended GPU: what it leaves out, repeats, and keeps when cut short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "gpu_suite"
MADE_UP = """
from pathlib import Path
import pytest, torch

def test_good(record_property):
    record_property("images_per_second", 5.0)
    assert torch.zeros(1, device="cuda").is_cuda

def test_bad():
    assert Path("mended").exists(), "not mended"

def test_absent():
    pytest.skip("it is not at hand")

def test_lost():
    if not Path("mended").exists():
        raise RuntimeError("CUDA error: unspecified launch failure")

@pytest.mark.takes(60)
def test_long():
    pass
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Runs tests that are made up here, as one process of the suite does; returns its status and the outcomes."""
    (tmp_path / "test_made_up.py").write_text(MADE_UP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))

    def run(*flags: str, seconds: float = 30.0) -> tuple[int, dict[str, str]]:
        sys.modules.pop("test_made_up", None)
        suite = ["-p", "benchmarks.gpu.suite_plugin", "--dry-run", "--results=made_up.json"]
        plain = ["-c", os.devnull, f"--rootdir={tmp_path}", "-p", "no:cacheprovider", str(tmp_path)]
        status = int(pytest.main([*suite, f"--deadline={time.time() + seconds}", *flags, *plain]))
        return status, {name.rpartition("::")[2]: test["outcome"] for name, test in kept().items()}

    return run


@pytest.fixture
def tool() -> dict[str, Any]:
    """Returns the names that the script defines; its functions see changes of them."""
    return run_path(str(TOOL))["main"].__globals__


def kept() -> dict[str, dict[str, Any]]:
    return json.loads(Path("made_up.json").read_text())


@pytest.mark.slow
def test_every_test_runs_in_small_on_the_pretended_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    done = subprocess.run([sys.executable, TOOL, "--dry-run", "--out", tmp_path], capture_output=True, text=True)
    tests = json.loads((tmp_path / "dry_run.json").read_text())
    assert {name: test["text"] for name, test in tests.items() if test["outcome"] == "failed"} == {}
    assert done.returncode == 0, done.stdout + done.stderr
    for name in "training packed loop op is_as_accurate_as_torch in_a_captured_graph".split():
        assert any(f"::test_{name}" in test for test in tests), name
    speed = next(test for name, test in tests.items() if "resnet_prop --batch-size 128 --compile on" in name)
    assert speed["figures"]["images_per_second"] > 0
    assert (speed["figures"]["captured"], speed["figures"]["compiled"]) == ("on", "on")


def test_what_is_done_is_left_out_and_what_is_left_goes_on(made_up, tool, capsys):
    """A failure of the GPU ends the process; what would take too long is left; failures are repeated on request."""
    expected = {"test_good": "passed", "test_bad": "failed", "test_absent": "skipped", "test_lost": "failed"}
    assert made_up("--commit=one") == (2, expected)
    Path("mended").touch()
    assert made_up("--commit=two") == (0, expected | {"test_long": "left"})
    good = kept()["test_made_up.py::test_good"]
    assert (good["commit"], good["figures"]) == ("one", {"images_per_second": 5.0})
    assert not tool["finished"](Path("made_up.json"))
    assert "'failed': 2, 'skipped': 1, 'left': 1}" in capsys.readouterr().out
    mended = {"test_bad": "passed", "test_lost": "passed", "test_long": "passed"}
    assert made_up("--retry", seconds=90.0) == (0, expected | mended)
    assert tool["finished"](Path("made_up.json"))


def test_time_that_is_up_ends_the_process_and_the_call(tmp_path, capfd, tool):
    sleeping = tmp_path / "sleeping.py"
    sleeping.write_text("import time; time.sleep(60)")
    assert not tool["run"]([str(sleeping)], time.time() + 1)
    assert capfd.readouterr().err == "stopped; the same call goes on\n"
