"""The part of `tools/gpu_suite` within pytest: a file of every test's outcome, and a deadline.

The next call goes on from the file. With `--dry-run` every test runs on the pretended GPU of `tests/pretended_gpu.py`,
in small.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar import device as machine
from fastcifar.data import loader, synthetic
from fastcifar.diagnostics import profile
from fastcifar.diagnostics.machine import driver_version
from fastcifar.engine import evaluate
from fastcifar.runs.files import write_text
from fastcifar.runs.provenance import commit

TESTS = Path(__file__).resolve().parents[2] / "tests"
NO_TIME = "left to the next call, since there is no time"
USUAL_SECONDS = 5
"""How long a test takes that is not marked with `takes`."""
LONGEST_TEXT = 4_000
"""How many characters of a failure's text are kept."""
NEED_A_REAL_ONE = ("test_a_gpu_is_profiled", "test_opcheck", "test_runs_on_a_gpu_that_is_not_the_current_one")
"""Tests that need more than a pretended GPU: a profiler, the devices of torch's own test utilities, a second GPU."""
TINY = "--arch resnet --blocks 1 --channels 4 --batch-size 10".split()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu_suite")
    group.addoption("--results", type=Path, metavar="FILE", help="what every test came to")
    group.addoption("--retry", action="store_true", help="run again what failed")
    group.addoption("--deadline", type=float, metavar="TIME", help="what would end later is not begun")
    group.addoption("--commit", help="of the checkout, where that does not tell")
    group.addoption("--dry-run", action="store_true", help="run in small, on a pretended GPU")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dry_run"):
        for name in ("pretended_gpu", "pretended_dali"):
            config.pluginmanager.import_plugin(name)
    elif not torch.cuda.is_available():
        raise pytest.UsageError("no GPU was found that torch can use; run this where there is one, or give --dry-run.")
    if not hasattr(config, "workerinput"):  # a process of pytest-xdist reports to the one that writes
        config.pluginmanager.register(Results(config))


def kept_in(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


class Results:
    """Rewrites the file whenever a test begins or ends."""

    def __init__(self, config: pytest.Config) -> None:
        dry, self.path = config.getoption("dry_run"), config.getoption("results")
        self.tests = kept_in(self.path)
        self.origin = {
            "gpu": "pretended" if dry else torch.cuda.get_device_name(0),
            "driver": None if dry else driver_version(),
            "torch": torch.__version__,
            "commit": config.getoption("commit") or commit(),
        }

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tests[nodeid] = {"outcome": "begun", "seconds": 0.0, "figures": {}, "text": "", **self.origin}
        self.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests[report.nodeid]
        test["seconds"] += report.duration
        test["figures"] = dict(report.user_properties)
        if report.failed:
            test |= {"outcome": "failed", "text": report.longreprtext[-LONGEST_TEXT:]}
        elif report.skipped:
            text = report.longrepr[2].removeprefix("Skipped: ")
            test |= {"outcome": "left" if text == NO_TIME else "skipped", "text": text}
        elif report.when == "teardown" and test["outcome"] == "begun":
            test["outcome"] = "passed"
        self.write()

    def write(self) -> None:
        write_text(self.path, json.dumps(self.tests, indent=1, default=str) + "\n")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out the files in `tests` without a test for a GPU, which need not be imported."""
    if collection_path.name.startswith("test_") and TESTS in collection_path.parents:
        text = collection_path.read_text("utf-8")
        return True if "mark.gpu" not in text and '"card"' not in text else None
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is done; what was begun before comes last, in case it never ends."""
    done = ("passed",) if config.getoption("retry") else ("passed", "failed")
    earlier, chosen = kept_in(config.getoption("results")), {}
    for item in items:
        outcome = earlier[item.nodeid]["outcome"] if item.nodeid in earlier else None
        if outcome not in done and needs_gpu(item):
            chosen.setdefault(kind_of(item) if config.getoption("dry_run") else item.nodeid, item)
    left = sorted(chosen.values(), key=lambda item: item.nodeid in earlier)
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def needs_gpu(item: pytest.Item) -> bool:
    """Returns whether a test is beside this file, or one of `tests` that a CPU cannot do as well."""
    if TESTS not in item.path.parents:
        return True
    if item.config.getoption("dry_run"):  # those with `card` run on the pretended GPU anyway
        return item.get_closest_marker("gpu") is not None and item.originalname not in NEED_A_REAL_ONE
    return item.get_closest_marker("gpu") is not None or "card" in item.fixturenames


def kind_of(item: pytest.Item) -> object:
    """Returns what a dry run has one case of: in `tests` each test, and each operation within it."""
    if TESTS not in item.path.parents:
        return item.nodeid
    spec = item.callspec.params.get("spec") if hasattr(item, "callspec") else None
    return item.path, item.originalname, spec and spec.name


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("takes")
    if time.time() + (marker.args[0] if marker else USUAL_SECONDS) > item.config.getoption("deadline"):
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
    """Pretends a GPU in a dry run, and makes everything small; else drops the memory that earlier tests left."""
    torch.compiler.reset()
    if not request.config.getoption("dry_run"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    request.getfixturevalue("dali" if loader.dali_installed() else "gpu")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # which a DataLoader asks, in order to pin
    monkeypatch.setattr(profile, "COPY_SECONDS", 0.0)
    monkeypatch.setattr(synthetic, "SPLITS", {"train": 10, "test": 20})
    small = {"AT_ONCE": 2, "REPEATS": 2, "STEPS": 1, "MOST_CALLS": 1}
    for name, value in {**small, "matmul_flops_per_second": lambda device, dtype: 1e12}.items():
        monkeypatch.setattr(request.module, name, value, raising=False)
    monkeypatch.setitem(machine.MATRIX_SIZE, "cuda", 64)
    monkeypatch.setitem(evaluate.BATCH_SIZE, "cuda", 20)
    monkeypatch.setitem(loader.CHUNK_SIZE, "cuda", 40)
    monkeypatch.setitem(profile.COPIED_BYTES, "cuda", 2**20)


@pytest.fixture
def tiny(request: pytest.FixtureRequest) -> list[str]:
    """Returns flags that end a command line; in a dry run they name a small network."""
    return TINY if request.config.getoption("dry_run") else []
