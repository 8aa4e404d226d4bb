"""`tools/gpu_suite`: listing, resuming, stopping, and the check of its files; and one part as a CPU can run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fastcifar.analysis import results
from fastcifar.errors import FastcifarError

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # behind all others: what stands there has no names of its own

from suite import packed  # noqa: E402
from suite.command import main  # noqa: E402
from suite.measures import input_speed, op_speed, test_file  # noqa: E402
from suite.parts import GPU, PARTS, Part, recipes_by_cost  # noqa: E402
from suite.records import SCHEMA, Machine, PartlyFailed, Settings, read_part  # noqa: E402
from suite.runner import Call, carry_out  # noqa: E402

test_file.__test__ = False
TOOL = ROOT / "tools" / "gpu_suite"
MACHINE = Machine("A Card 1", "9.0", 1 << 30, "1.2", "13.0", 9, "a CPU", 2, "Linux")
MADE_UP = """
import os, time
from suite.records import PartlyFailed
from test_gpu_suite_rows import Made

def measure(item, settings, folder):
    with open(os.environ["MADE_UP_LOG"], "a") as log:
        print(item, file=log)
    if item == "slow":
        os.fork()
        for _ in range(600):
            with open(os.environ["MADE_UP_LOG"] + f"-{os.getpid()}", "a") as log:
                print("alive", file=log)
            time.sleep(0.1)
    if item == "bad":
        raise RuntimeError("what is wrong")
    if item == "half":
        raise PartlyFailed([Made(item, 0.5)], "the other half")
    return [Made(item, 1.5)]
"""
ROWS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Made:
    name: str
    value: float
"""


@dataclass(frozen=True)
class Made:
    """A row of the part that is made up here."""

    name: str
    value: float


@pytest.fixture
def call(tmp_path, monkeypatch) -> Call:
    (tmp_path / "made_up.py").write_text(MADE_UP)
    (tmp_path / "test_gpu_suite_rows.py").write_text(ROWS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MADE_UP_LOG", str(tmp_path / "log"))
    (tmp_path / "out").mkdir()
    return Call(tmp_path / "out", Settings("cpu"), 60.0, MACHINE, {"torch": "2.11"}, "abc")


def part(*items: str, **changes) -> Part:
    return replace(Part("made", "made up", Made, "made_up:measure", lambda settings: list(items)), **changes)


def started(tmp_path: Path) -> list[str]:
    """The items whose measuring was begun, in order."""
    log = tmp_path / "log"
    return log.read_text().split() if log.exists() else []


def test_what_is_there_is_not_measured_again(call, tmp_path):
    first = carry_out(part("one"), call)
    assert (first.state, first.rows, list(first.items)) == ("complete", [Made("one", 1.5)], ["one"])
    again = carry_out(part("one", "bad", "two"), call)
    assert started(tmp_path) == ["one", "bad", "two"]
    assert (again.state, [row.name for row in again.rows]) == ("complete", ["one", "two"])
    assert again.failures == {"bad": "RuntimeError: what is wrong"}
    assert carry_out(part("one", "bad", "two"), replace(call, commit="another")) == again
    assert read_part(call.out / "a_card_1_made.json", "made", Made) == again
    assert [path.name for path in call.out.iterdir()] == ["a_card_1_made.json"]
    with pytest.raises(FastcifarError, match="begun with another commit; choose another --out"):
        carry_out(part("one", "three"), replace(call, commit="another"))
    with pytest.raises(FastcifarError, match="without --smoke"):
        carry_out(part("one"), replace(call, settings=Settings("cpu", smoke=True)))


def test_an_item_that_fails_in_part_leaves_the_rest(call):
    content = carry_out(part("half"), call)
    assert (content.rows, content.items) == ([Made("half", 0.5)], {})
    assert content.failures["half"].endswith("PartlyFailed: the other half")


def test_a_part_is_stopped_when_its_time_is_up(call, tmp_path):
    """With all that it started; what it had all the time for is not tried again, and what came too late is left to the next call."""
    begin, short = time.monotonic(), replace(call, seconds=4.0)
    content = carry_out(part("slow", "one"), short)
    assert time.monotonic() - begin < 30
    assert (content.state, content.rows) == ("partial", [])
    assert list(content.failures) == ["slow"]
    beats = [(path, path.stat().st_size) for path in tmp_path.glob("log-*")]
    time.sleep(0.5)
    assert len(beats) == 2
    assert all(path.stat().st_size == size for path, size in beats)
    content = carry_out(part("slow", "one"), call)
    assert (content.state, [row.name for row in content.rows]) == ("complete", ["one"])
    assert started(tmp_path) == ["slow", "one"]


def test_what_would_not_fit_is_not_begun(call, tmp_path):
    costs = {"one": 1e-3, "dear": 1e9}
    content = carry_out(part("one", "dear", cost=costs.get), call)
    assert (content.state, list(content.items), content.failures) == ("partial", ["one"], {})
    assert started(tmp_path) == ["one"]


def test_a_part_that_lacks_something_is_skipped_and_says_why(call, capsys):
    assert carry_out(part("one", needs=(GPU, "no_such_module")), call) is None
    assert "skipped, since it needs a GPU, but the CPU was chosen; no_such_module, but it cannot be imported" in capsys.readouterr().out
    assert list(call.out.iterdir()) == []
    assert list(carry_out(part("one", uses=("no_such_module",)), call).skipped) == ["no_such_module"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text[:-20], "cannot be read"),
        (lambda text: text.replace('"driver"', '"drover"'), "did you mean driver"),
        (lambda text: text.replace('"1.2"', "1.2"), "driver is 1.2; expected str"),
        (lambda text: text.replace('"value": 1.5', '"value": "1.5"'), "rows: value is '1.5'; expected float"),
        (lambda text: text.replace('"value": 1.5', '"worth": 1.5'), "unknown key 'worth'"),
        (lambda text: text.replace(SCHEMA, "another/1"), f"is another/1 of made; expected {SCHEMA} of made"),
    ],
)
def test_a_damaged_file_is_refused(call, damage, expected):
    carry_out(part("one"), call)
    path = call.out / "a_card_1_made.json"
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(FastcifarError, match="remove it, and the suite measures that part anew") as caught:
        carry_out(part("one"), call)
    assert expected in str(caught.value)


def test_rows_of_a_file_of_tests():
    report = """<testsuites><testsuite>
        <testcase name="a" time="1.5"/>
        <testcase name="b" time="0.5"><failure message="assert 1 == 2&#10;where">long</failure></testcase>
        <testcase name="c" time="0"><skipped message="DALI is not installed"/></testcase>
        <testcase name="d" time="0"><error message="fixture 'x' not found"/></testcase></testsuite></testsuites>"""
    row = test_file("tests/test_x.py", ElementTree.fromstring(report))
    assert (row.passed, row.failed, row.skipped, row.seconds) == (1, 2, 1, 2.0)
    assert row.failures == {"b": "assert 1 == 2", "d": "fixture 'x' not found"}
    assert row.reasons == {"DALI is not installed": 1}


def test_rows_of_benchmarks():
    row = op_speed("ema_update_", "test_op[ema_update_-resnet20-4-tail-bfloat16-forward]", {"seconds": 1.0, "times_rival": 2.0})
    assert (row.case, row.dtype, row.direction, row.share_of_copy_bandwidth) == ("resnet20-4-tail", "bfloat16", "forward", None)
    info = {"policy": "standard", "device": "cpu, one core", "images_per_second": 5.0, "times_kornia": 2.0}
    assert input_speed("test_loader[dali-standard]", info).pipeline == "loader dali"
    assert input_speed("test_rival[torchvision_pil-standard]", info).pipeline == "torchvision_pil"
    row = input_speed("test_kornia[standard]", info)
    assert (row.pipeline, row.times) == ("kornia", {"kornia": 2.0})


def test_recipes_by_cost():
    names = recipes_by_cost(Settings(recipes=("r1_resnet*_standard", "r5_resnet20_*")))
    assert names.index("r5_resnet20_sgd") < names.index("r5_resnet20_asam") < names.index("r1_resnet_prop_standard")
    assert sorted(names) == sorted(set(names))


def test_a_dry_run_lists_the_parts(tmp_path, capsys):
    names = [name for name in PARTS if name != "time_to_accuracy"]
    assert main(["--out", str(tmp_path / "out"), "--dry-run", "--device", "cpu", "--only", *names]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if not line.startswith(" ")] == names
    assert "skipped: it needs a GPU, but the CPU was chosen" in printed
    assert not (tmp_path / "out").exists()
    assert len(PARTS) <= 8


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((), "gpu_suite: no GPU that torch can use was found"), (("--only", "kernel"), "unknown part 'kernel'; did you mean kernels?")],
)
def test_refusals(tmp_path, capsys, monkeypatch, arguments, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not (tmp_path / "out").exists()


def test_a_part_on_a_cpu(tmp_path):
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--smoke", "--only", "training", "correctness"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "correctness: skipped, since it needs a GPU" in done.stdout
    content = read_part(tmp_path / "cpu_training.json", "training", PARTS["training"].row)
    (row,) = content.rows
    assert (row.network, row.images, row.compiled, content.state) == ("resnet20_v2", 64, False, "complete")
    assert row.images_per_second > 0
    assert content.machine.gpu is None
    assert content.versions["torch"]


@pytest.mark.parametrize("way", ["streams", pytest.param("processes", marks=pytest.mark.slow)])
def test_packed_runs(monkeypatch, tmp_path, way):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    one, two = packed.packed(f"resnet20_v2 {way}", Settings("cpu", smoke=True), tmp_path)
    for runs, row in enumerate((one, two), start=1):
        assert (row.network, row.way, row.runs, row.captured, row.batch_size) == ("resnet20_v2", way, runs, False, 32)
        assert row.images_per_second > 0
    assert (one.times_one, two.times_one) == (1.0, two.images_per_second / one.images_per_second)


def test_packed_runs_name_what_failed_and_keep_the_rest(monkeypatch, tmp_path):
    """Not those that waited for it."""
    genuine, arrived = packed.timed_with_others, []

    def second_of_two_fails(trainer, barrier, settings):
        arrived.append(trainer)
        if len(arrived) == 3:
            raise MemoryError("no room")
        return genuine(trainer, barrier, settings)

    monkeypatch.setattr(packed, "timed_with_others", second_of_two_fails)
    with pytest.raises(PartlyFailed, match="2 at once: MemoryError: no room") as caught:
        packed.packed("resnet20_v2 streams", Settings("cpu", smoke=True), tmp_path)
    assert [row.runs for row in caught.value.rows] == [1]


def test_the_committed_files_are_whole_and_no_smoke():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        if "part" in content and content["schema"] in (SCHEMA, results.SCHEMA):
            assert not read_part(path, content["part"], PARTS[content["part"]].row).settings.smoke
