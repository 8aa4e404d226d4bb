"""The table of what the defaults learn: it has a row for everything that has a name, and is what the result file
says.
"""

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from fastcifar.models import ARCHITECTURES
from fastcifar.optim import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "first_epochs_cpu_2_cores_amx.json"


@pytest.fixture(scope="module")
def tool():
    loader = SourceFileLoader("first_epochs", str(ROOT / "tools" / "first_epochs"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("first_epochs", loader))
    sys.modules["first_epochs"] = module  # which its dataclass asks for
    loader.exec_module(module)
    yield module
    del sys.modules["first_epochs"]


def made(tool, arch, optimizer, **changes):
    known = {
        "images": 10_000,
        "test_accuracy": 0.321,
        "averaged_test_accuracy": 0.3,
        "train_loss": 1.8765,
        "failure": None,
    }
    return tool.Row(arch, optimizer, **{**known, **changes}, seconds=1.0, device="a CPU", versions={}, commit=None)


def test_every_architecture_and_every_optimiser_has_a_run(tool):
    tasks = tool.tasks()
    assert {arch for arch, _ in tasks} == set(ARCHITECTURES)
    assert {optimizer for arch, optimizer in tasks if arch == "resnet_prop"} == set(OPTIMIZERS)
    assert len(tasks) == len(set(tasks)) == len(ARCHITECTURES) + len(OPTIMIZERS) - 1


def test_a_table_says_what_was_measured_and_what_was_not(tool):
    rows = [made(tool, "resnet18", "sgd-nesterov")]
    rows += [made(tool, "resnet_prop", "muon", test_accuracy=None, train_loss=None, failure="the loss became NaN.")]
    lines = tool.table(rows).splitlines()
    assert "| `resnet18` | `sgd-nesterov` | 10,000 | 1.88 | 32.1% |" in lines
    assert "| `resnet_prop` | `muon` | 10,000 | not finite |  |" in lines
    assert "| `wrn` | `sgd-nesterov` | not yet measured |  |  |" in lines


def test_the_committed_table_is_what_the_result_file_says_and_all_of_it_learns(tool):
    rows = tool.read(RESULTS)
    text = tool.DOCUMENT.read_text()
    assert tool.replaced(text, rows) == text
    for row in rows:
        assert row.failure is None
        assert row.test_accuracy > 0.1, f"{row.key} is not above chance"
