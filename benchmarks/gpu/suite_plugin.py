"""What `tools/gpu_suite` adds to pytest: a file of what every test came to, written as they go; what is done is left
out, and time is kept.

With `--dry-run` every test runs on the pretended GPU of `tests/pretended_gpu.py`, in small.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar import device as machine
from fastcifar.data import loader, synthetic
from fastcifar.diagnostics import profile
from fastcifar.diagnostics.machine import driver_version, usable_cpus
from fastcifar.engine import evaluate, run
from fastcifar.runs.files import write_text

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = "fastcifar.gpu_suite/2"
STOPPED = 128 + signal.SIGTERM
NO_TIME = "left to the next call, since there is no time"
EARLIER = pytest.StashKey[dict[str, str]]()
"""Outcomes of earlier calls."""
LONGEST_TEXT = 4_000
"""Characters of what a failure says that are kept."""
NEED_A_REAL_ONE = ("test_a_gpu_is_profiled", "test_opcheck", "test_runs_on_a_gpu_that_is_not_the_current_one")
"""Tests that ask more of a GPU than to pretend: a profiler, the devices of torch's own test utilities, a second GPU."""
TINY = "--arch resnet --blocks 1 --channels 4 --batch-size 10".split()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu_suite")
    group.addoption("--results", metavar="FILE", help="what every test came to, of this call and earlier ones")
    group.addoption("--retry", action="store_true", help="run again what failed")
    group.addoption(
        "--deadline", type=float, metavar="TIME", help="seconds since 1970; what would end later is not begun"
    )
    group.addoption("--commit", help="of the checkout, where that does not tell")
    group.addoption("--dry-run", action="store_true", help="run in small, on a pretended GPU")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dry_run"):
        for name in ("pretended_gpu", "pretended_dali"):
            config.pluginmanager.import_plugin(name)
    elif not torch.cuda.is_available():
        raise pytest.UsageError(
            "no GPU that torch can use was found; run the suite where there is one, or give --dry-run."
        )
    if hasattr(config, "workerinput"):  # a process of pytest-xdist, which reports to the one that writes
        config.stash[EARLIER] = config.workerinput["earlier"]
    else:
        results = Results(Path(config.getoption("results")), this_machine(config))
        config.pluginmanager.register(results)
        config.stash[EARLIER] = results.earlier
        signal.signal(signal.SIGTERM, results.stop)
        signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, max(config.getoption("deadline") - time.time(), 1.0))


def this_machine(config: pytest.Config) -> dict[str, Any]:
    """What the figures are of."""
    card = None if config.getoption("dry_run") else torch.cuda.get_device_properties(0)
    return {
        "gpu": card.name if card else "pretended",
        "memory_bytes": card.total_memory if card else None,
        "driver": driver_version() if card else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpu": machine.processor_name(),
        "cores": usable_cpus(),
        "versions": run.versions(),
        "commit": config.getoption("commit") or run.commit(),
    }


def read_results(path: Path) -> dict[str, Any]:
    """The content of a file of results; an empty one where there is none. Raises UsageError where it is damaged or
    something else.
    """
    if not path.exists():
        return {"schema": SCHEMA, "machine": None, "tests": {}}
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"it is {content['schema']} in place of {SCHEMA}")
        return content
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise pytest.UsageError(f"{path} cannot be read ({error}); remove it, or choose another --out.") from error


class Results:
    """Rewrites the file whenever a test begins or ends.

    At the deadline, or on SIGTERM, pytest ends with the status 143, and what it was at is left to the next call;
    training answers that signal itself, and is saved. A test that is found as `running` by the next process took the
    one before it down.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path, self.stopped, content = path, False, read_results(path)
        earlier = content["machine"]
        if earlier and earlier["gpu"] != machine["gpu"]:
            raise pytest.UsageError(f"{path} is of {earlier['gpu']}, not of {machine['gpu']}; choose another --out.")
        self.tests: dict[str, dict[str, Any]] = content["tests"]
        self.content = {**content, "machine": machine}
        self.end_running("failed", "its process died")
        self.earlier = {name: test["outcome"] for name, test in self.tests.items()}
        self.origin = {"commit": machine["commit"], "driver": machine["driver"], "torch": torch.__version__}

    def stop(self, number: int, frame: object) -> None:
        self.stopped = True
        raise KeyboardInterrupt  # which no handler of errors takes for a failure of its own

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Has every process of pytest-xdist, those that take the place of others too, choose the same tests."""
        node.workerinput["earlier"] = self.earlier

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.stopped or exitstatus == STOPPED:
            session.exitstatus = STOPPED
            self.end_running("left", "stopped")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.note(nodeid, outcome="running", seconds=0.0, figures={}, text="", **self.origin)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests[report.nodeid]
        found = {"seconds": test["seconds"] + report.duration, "figures": dict(report.user_properties)}
        if report.failed:
            found |= {"outcome": "failed", "text": report.longreprtext[-LONGEST_TEXT:]}
        elif report.skipped:
            text = report.longrepr[2].removeprefix("Skipped: ")
            found |= {"outcome": "left" if text == NO_TIME else "skipped", "text": text}
        elif report.when == "teardown" and test["outcome"] == "running":
            found["outcome"] = "passed"
        self.note(report.nodeid, **found)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.note(
                report.nodeid,
                outcome="failed",
                seconds=0.0,
                figures={},
                text=report.longreprtext[-LONGEST_TEXT:],
                **self.origin,
            )

    def end_running(self, outcome: str, text: str) -> None:
        for name in [name for name, test in self.tests.items() if test["outcome"] == "running"]:
            self.note(name, outcome=outcome, text=text)

    def note(self, name: str, **found: Any) -> None:
        self.tests[name] = {**self.tests.get(name, {}), **found}
        write_text(self.path, json.dumps(self.content, indent=1, default=str) + "\n")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """The files in `tests` without a test for a GPU need not be imported."""
    if collection_path.name.startswith("test_") and ROOT / "tests" in collection_path.parents:
        text = collection_path.read_text("utf-8")
        return True if "mark.gpu" not in text and '"card"' not in text else None
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is done; what was begun before comes last, in case it never ends."""
    if config.getoption("dry_run"):
        items[:] = one_of_each(items)
    earlier, done = config.stash[EARLIER], ("passed",) if config.getoption("retry") else ("passed", "failed")
    left = [item for item in items if needs_gpu(item) and earlier.get(item.nodeid) not in done]
    left.sort(key=lambda item: item.nodeid in earlier)
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def one_of_each(items: list[pytest.Item]) -> list[pytest.Item]:
    """Keeps the first case that needs a GPU of each test and operation in `tests`, and everything else."""
    chosen = {}
    for item in items:
        if ROOT / "tests" not in item.path.parents:
            chosen[item.nodeid] = item
        elif item.get_closest_marker("gpu") and item.originalname not in NEED_A_REAL_ONE:
            item.own_markers[:] = [
                marker for marker in item.own_markers if marker.kwargs.get("reason") != "no CUDA device"
            ]
            spec = item.callspec.params.get("spec") if hasattr(item, "callspec") else None
            chosen.setdefault((item.path, item.originalname, spec and spec.name), item)
    return list(chosen.values())


def needs_gpu(item: pytest.Item) -> bool:
    return (
        ROOT / "tests" not in item.path.parents
        or item.get_closest_marker("gpu") is not None
        or "card" in item.fixturenames
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("takes")
    if time.time() + (marker.args[0] if marker else 5) > item.config.getoption("deadline"):
        pytest.skip(NO_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    if call.when == "call" and "benchmark" in item.funcargs:
        item.user_properties += item.funcargs["benchmark"].extra_info.items()
    report = yield
    if report.failed and "CUDA error" in report.longreprtext:
        item.session.shouldstop = "the GPU failed, after which nothing works in this process"
    return report


@pytest.fixture(autouse=True)
def in_small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a dry run, a GPU that is pretended, and as little of everything as shows that it runs; else one without
    earlier tests' memory.
    """
    torch.compiler.reset()
    if not request.config.getoption("dry_run"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    request.getfixturevalue("dali" if loader.dali_installed() else "gpu")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # which a DataLoader asks, in order to pin
    monkeypatch.setattr(profile, "traced", lambda *arguments: [])
    monkeypatch.setattr(profile, "parts_on_gpu", lambda *arguments: {"data": 1.0})
    monkeypatch.setattr(profile, "COPY_SECONDS", 0.0)
    for name, small in (
        ("AT_ONCE", 2),
        ("REPEATS", 2),
        ("MOST_CALLS", 1),
        ("matmul_flops_per_second", lambda device, dtype: 1e12),
    ):
        monkeypatch.setattr(request.module, name, small, raising=False)
    monkeypatch.setattr(synthetic, "SPLITS", {"train": 10, "test": 20})
    for sizes, size in (
        (machine.MATRIX_SIZE, 64),
        (evaluate.BATCH_SIZE, 20),
        (loader.CHUNK_SIZE, 40),
        (profile.COPIED_BYTES, 2**20),
    ):
        monkeypatch.setitem(sizes, "cuda", size)


@pytest.fixture
def tiny(request: pytest.FixtureRequest) -> list[str]:
    """Flags that end a command line; in a dry run they name a small network."""
    return TINY if request.config.getoption("dry_run") else []
