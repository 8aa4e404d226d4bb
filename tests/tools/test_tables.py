"""The tables of claims and measurements, from made-up result files, and the committed tables.

The committed ones must be what the results say.
"""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

import pytest
from made_row import row

from fastcifar.errors import FastcifarError
from fastcifar.many.results import write_rows
from fastcifar.recipes import RECIPES

TABLES = "headlines,R1,R2,R3,R4,R5,ours,other lengths,first epochs,loaders".split(",")


@pytest.fixture
def tool():
    """Returns the names that the script defines; its functions see changes of them."""
    return run_path(str(Path(__file__).resolve().parents[2] / "tools" / "tables"))["main"].__globals__


@pytest.fixture
def root(tmp_path, monkeypatch, tool) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "speeds.json").write_text('{"machine": {}, "benchmarks": []}')
    places = "".join(f"<!-- table: {name} -->\nold\n<!-- end of table -->\n" for name in TABLES)
    (tmp_path / "RESULTS.md").write_text(f"before\n{places}after\n")
    monkeypatch.setitem(tool, "loaders", lambda: "new\n")
    return tmp_path


def test_what_was_measured_stands_beside_the_claims(tool, root, capsys):
    accuracies = [0.950, 0.952, 0.957]
    rows = [row("r1_resnet_prop_standard", *it, watched_test_accuracy=0.958) for it in enumerate(accuracies)]
    rows += [row("r1_resnet20_standard", seed, 0.86, average=0.861, epochs=15) for seed in (0, 1)]
    rows += [row("r2_200_epochs", 0, 0.5, average=0.9105)]
    write_rows(root / "benchmarks" / "results" / "made_up.json", rows)
    before = (root / "RESULTS.md").read_text()
    assert tool["main"](["--check", "--root", str(root)]) == 1
    assert capsys.readouterr().err == "RESULTS.md: not what the results say; run tools/tables.\n"
    assert (root / "RESULTS.md").read_text() == before
    assert tool["main"](["--root", str(root)]) == 0
    text = (root / "RESULTS.md").read_text()
    assert text.startswith("before\n<!-- table: headlines -->\n| recipe | claim |")
    assert text.endswith("<!-- table: loaders -->\nnew\n<!-- end of table -->\nafter\n")
    assert set(RECIPES) <= {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    for line in (
        "| `r1_resnet_prop_standard` | R1 T5 | 95.15 | 3 | **95.30 ± 0.36** |  |  | 95.80 ± 0.00 | met | 100 | a GPU |",
        "| `r1_resnet_prop_standard` | 95.15 | 95.30 ± 0.36 | 3 | met | 100 | a GPU |",
        "| `r2_200_epochs` | R2 F4 | 91.19 | 1 | 50.00 | **91.05** |  |  | met | 100 | a GPU |",
        "| `r2_200_epochs` | 91.19 | 91.05 | 1 | met | 100 | a GPU |",
        "| `r1_resnet20_standard` | 15 | 200 | 2 | **86.00 ± 0.00** | 86.10 ± 0.00 | 100 | a GPU |",
        "| `r4_final` | 96.10 |  |  |  |  |  |",
    ):
        assert line in text
    assert tool["main"](["--check", "--root", str(root)]) == 0


def test_a_table_that_cannot_be_made_is_left_and_one_without_a_place_is_named(tool, root, monkeypatch):
    def without_dali():
        raise ModuleNotFoundError("No module named 'nvidia'")

    monkeypatch.setitem(tool, "loaders", without_dali)
    (root / "RESULTS.md").write_text((root / "RESULTS.md").read_text().replace("table: R3", "table: R33"))
    with pytest.raises(FastcifarError, match="no file has a place for R3; add"):
        tool["main"](["--root", str(root)])
    assert "<!-- table: loaders -->\nold\n" in (root / "RESULTS.md").read_text()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("quickstart", settings={"lr": 0.3})], "quickstart, 5 epochs, seed 0, is of that recipe as it used to be"),
        ([row("quickstart", epochs=6, full_length=True)], "is of that recipe as it used to be"),
        ([replace(row("quickstart"), recipe="gone")], "gone, 5 epochs, seed 0, is of no recipe that there is"),
        ([row("quickstart"), row("quickstart")], "quickstart, 5 epochs, seed 0, is there twice on a GPU"),
    ],
)
def test_rows_that_mislead_are_refused(tool, tmp_path, rows, expected):
    write_rows(tmp_path / "made_up.json", rows)
    with pytest.raises(FastcifarError, match=expected):
        tool["committed_rows"](tmp_path)


def test_the_committed_tables_are_what_the_results_say(tool, capsys):
    assert tool["main"](["--check"]) == 0, capsys.readouterr().err
