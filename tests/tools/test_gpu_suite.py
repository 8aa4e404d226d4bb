"""`tools/gpu_suite` in small on the pretended GPU: what it leaves out, repeats, and keeps when cut short."""

from __future__ import annotations

import json
import os
import signal
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
import os, signal
from pathlib import Path
import pytest, torch

def test_good(record_property):
    record_property("images_per_second", 5.0)
    assert torch.zeros(1, device="cuda").is_cuda

def test_bad():
    assert Path("mended").exists(), "not mended"

def test_absent():
    pytest.skip("it is not at hand")

def test_kills():
    if not Path("mended").exists():
        os.kill(os.getpid(), signal.SIGTERM)

@pytest.mark.takes(60)
def test_long():
    pass
"""


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
        return status, {
            name.rpartition("::")[2]: test["outcome"] for name, test in kept_in(Path("made_up.json")).items()
        }

    return run


@pytest.fixture
def tool() -> dict[str, Any]:
    """Returns the names that the script defines; its functions see changes of them."""
    return run_path(str(TOOL))["run_part"].__globals__


def kept_in(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text())["tests"]


@pytest.mark.slow
def test_everything_runs_in_small_on_the_pretended_gpu(tmp_path, monkeypatch, tool):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    done = subprocess.run([sys.executable, TOOL, "--dry-run", "--out", tmp_path], capture_output=True, text=True)
    tests = kept_in(tmp_path / "dry_run.json")
    assert {name: test["text"] for name, test in tests.items() if test["outcome"] == "failed"} == {}
    assert done.returncode == 0, done.stdout + done.stderr
    for name in "training profile recipe doctor packed loop op is_as_accurate_as_torch in_a_captured_graph".split():
        assert any(f"::test_{name}" in test for test in tests), name
    speed = next(test for name, test in tests.items() if "resnet_prop --batch-size 128 --compile on" in name)
    assert speed["figures"]["images_per_second"] > 0
    assert (speed["figures"]["captured"], speed["figures"]["compiled"]) == ("on", "on")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["r1_resnet20_standard", "r1_resnet_prop_standard"]
    assert len({name for name, _, _ in tool["PARTS"]} | {"results"}) <= 8, "the most files that a folder may hold"


def test_what_is_done_is_left_out_and_what_was_stopped_goes_on(made_up, tool, capsys):
    """What would take too long is left, and failures are repeated on request.

    What is of another commit is kept.
    """
    path = Path("made_up.json")
    expected = {"test_good": "passed", "test_bad": "failed", "test_absent": "skipped", "test_kills": "left"}
    assert made_up("--commit=one") == (2, expected)
    Path("mended").touch()
    expected |= {"test_kills": "passed", "test_long": "left"}
    assert made_up("--commit=two") == (0, expected)
    good = kept_in(path)["test_made_up.py::test_good"]
    assert (good["commit"], good["figures"]) == ("one", {"images_per_second": 5.0})
    assert not tool["report"](path)
    said = capsys.readouterr().out
    for line in ("failed  test_made_up.py::test_bad: AssertionError: not mended", "left    test_made_up.py::test_long"):
        assert line in said
    assert "by one, driver None; two, driver None" in said
    assert made_up("--retry", seconds=90.0)[1] == expected | {"test_bad": "passed", "test_long": "passed"}
    assert tool["report"](path)


def test_nothing_is_run_where_the_gpu_has_failed_and_what_took_its_process_down_has_failed(made_up, capsys):
    """Nothing is run either where the results are of another card."""
    lost = "def test_lost():\n    raise RuntimeError('CUDA error: unspecified launch failure')\n"
    Path("test_made_up.py").write_text(lost + "\ndef test_after(): pass\n")
    assert made_up() == (2, {"test_lost": "failed"})
    assert made_up() == (0, {"test_lost": "failed", "test_after": "passed"})
    path = Path("made_up.json")
    path.write_text(path.read_text().replace('"passed"', '"running"'))
    assert made_up() == (5, {"test_lost": "failed", "test_after": "failed"})
    path.write_text(path.read_text().replace('"pretended"', '"A Card"'))
    assert made_up()[0] == 4
    assert "is of A Card, not of pretended; choose another --out." in capsys.readouterr().err


def test_a_process_that_dies_is_followed_by_another(tool, tmp_path, monkeypatch):
    """At most `MOST_PROCESSES` are started for a part."""
    calls, statuses = [], [-signal.SIGSEGV, 2, 0, 4, *[3] * tool["MOST_PROCESSES"]]
    monkeypatch.setitem(tool, "run_pytest", lambda flags: calls.append(flags[-1]) or statuses.pop(0))
    assert tool["run_part"](tmp_path / "part.json", ["made_up"], True)
    assert calls == ["--retry", "made_up", "made_up"]
    assert not tool["run_part"](tmp_path / "part.json", ["made_up"], False)
    assert tool["run_part"](tmp_path / "part.json", ["made_up"], False)
    assert not statuses


def test_time_that_is_up_ends_the_process_and_the_call(tmp_path, monkeypatch, capfd, tool):
    sleeping = tmp_path / "sleeping.py"
    sleeping.write_text("import time; time.sleep(60)")
    monkeypatch.setitem(tool, "PYTEST", str(sleeping))
    begun = time.monotonic()
    assert tool["main"](["--out", str(tmp_path), "--stage", "3", "--seconds", "1"]) == 1
    assert time.monotonic() - begun < 30
    assert capfd.readouterr().err == "stopped; the same call goes on\n"
