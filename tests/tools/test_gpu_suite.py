"""`tools/gpu_suite`: all of it in small on the pretended GPU; what it leaves out, tries again, and keeps when it is
cut short.
"""

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


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Runs tests that are made up here, as one process of the suite does; returns its status, and the outcomes by
    the tests' names.
    """
    (tmp_path / "test_made_up.py").write_text(MADE_UP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}

    def run(*flags: str, seconds: float = 30.0, read: bool = True) -> tuple[int, dict[str, str]]:
        arguments = [
            "--dry-run",
            f"--results={tmp_path / 'made_up.json'}",
            f"--deadline={time.time() + seconds}",
            *flags,
        ]
        plain = ["-c", os.devnull, f"--rootdir={tmp_path}", "-p", "no:cacheprovider", str(tmp_path)]
        sys.modules.pop("test_made_up", None)
        status = int(pytest.main(["-p", "suite_plugin", *arguments, *plain]))
        kept = kept_in(tmp_path / "made_up.json") if read else {}
        return status, {name.rpartition("::")[2]: test["outcome"] for name, test in kept.items()}

    yield run
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def tool() -> dict[str, Any]:
    """What the script defines; its functions see changes of `tool["run_part"].__globals__`."""
    return run_path(str(TOOL))["run_part"].__globals__


def kept_in(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text())["tests"] if path.exists() else {}


@pytest.mark.slow
def test_everything_runs_in_small_on_the_pretended_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    done = subprocess.run(
        [sys.executable, str(TOOL), "--dry-run", "--out", str(tmp_path)], capture_output=True, text=True
    )
    tests = kept_in(tmp_path / "dry_run.json")
    assert {name: test["text"] for name, test in tests.items() if test["outcome"] == "failed"} == {}
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "training",
        "profile",
        "recipe",
        "doctor",
        "packed",
        "loop",
        "op",
        "is_as_accurate_as_torch",
        "in_a_captured_graph",
    ):
        assert any(f"::test_{name}" in test for test in tests), name
    speed = next(test for name, test in tests.items() if "resnet_prop --batch-size 128 --compile on" in name)
    assert speed["figures"]["images_per_second"] > 0
    assert (speed["figures"]["captured"], speed["figures"]["compiled"]) == ("on", "on")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["r1_resnet20_standard", "r1_resnet_prop_standard"]


def test_a_folder_holds_eight_files_at_most(tool):
    assert len({name for name, _, _ in tool["PARTS"]} | {"results"}) <= 8
    assert {stage for _, stage, _ in tool["PARTS"]} == {1, 2, 3}


def test_what_is_done_is_left_out_and_what_was_stopped_goes_on(made_up, tool, tmp_path, capsys):
    """What would take too long is left, what failed is tried again where that is asked for, and what is of another
    commit is kept.
    """
    status, outcomes = made_up()
    assert status == tool["EXIT_STOPPED"]
    assert outcomes == {"test_good": "passed", "test_bad": "failed", "test_absent": "skipped", "test_kills": "left"}
    path = tmp_path / "made_up.json"
    path.write_text(
        path.read_text().replace(json.dumps(kept_in(path)["test_made_up.py::test_good"]["commit"]), '"another"')
    )
    (tmp_path / "mended").touch()
    assert made_up() == (0, outcomes | {"test_kills": "passed", "test_long": "left"})
    good = kept_in(path)["test_made_up.py::test_good"]
    assert (good["commit"], good["figures"]) == ("another", {"images_per_second": 5.0})
    assert not tool["report"](path)
    said = capsys.readouterr().out
    assert "failed  test_made_up.py::test_bad: AssertionError: not mended" in said
    assert "left    test_made_up.py::test_long" in said
    assert "; another, driver None" in said
    assert made_up("--retry", seconds=90.0)[1] == dict.fromkeys(outcomes, "passed") | {
        "test_absent": "skipped",
        "test_long": "passed",
    }
    assert tool["report"](path)


def test_nothing_is_run_where_the_gpu_has_failed_and_what_took_its_process_down_has_failed(made_up, tmp_path):
    (tmp_path / "test_made_up.py").write_text(
        "def test_lost():\n    raise RuntimeError('CUDA error: unspecified launch failure')\n\ndef test_after(): pass\n"
    )
    assert made_up() == (2, {"test_lost": "failed"})
    assert made_up() == (0, {"test_lost": "failed", "test_after": "passed"})
    path = tmp_path / "made_up.json"
    path.write_text(path.read_text().replace('"passed"', '"running"'))
    assert made_up() == (5, {"test_lost": "failed", "test_after": "failed"})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "cannot be read"),
        ('{"schema": "another/1", "tests": {}}', "is another/1 in place of fastcifar.gpu_suite/2"),
        (
            '{"schema": "fastcifar.gpu_suite/2", "machine": {"gpu": "A Card"}, "tests": {}}',
            "is of A Card, not of pretended; choose another",
        ),
    ],
)
def test_results_that_are_damaged_or_of_another_card_are_refused(made_up, tmp_path, capsys, content, expected):
    (tmp_path / "made_up.json").write_text(content)
    assert made_up(read=False)[0] == 4
    assert expected in capsys.readouterr().err
    assert (tmp_path / "made_up.json").read_text() == content


def test_a_process_that_dies_is_followed_by_another(tool, tmp_path, monkeypatch):
    """But not for ever, nor where it was stopped."""
    flags, statuses = [], [-signal.SIGSEGV, 2, 0]
    monkeypatch.setitem(tool, "run_pytest", lambda given: flags.append(given[-1]) or statuses.pop(0))
    assert tool["run_part"](tmp_path / "part.json", ["made_up"], True) == 0
    assert flags == ["--retry", "made_up", "made_up"]
    statuses += [tool["EXIT_STOPPED"], *[3] * tool["MOST_PROCESSES"]]
    assert tool["run_part"](tmp_path / "part.json", ["made_up"], False) == tool["EXIT_STOPPED"]
    assert tool["run_part"](tmp_path / "part.json", ["made_up"], False) == tool["EXIT_UNFINISHED"]


def test_the_committed_files_are_of_real_cards():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        assert isinstance(content, list) or content.get("machine", {}).get("gpu") != "pretended"
