"""The table of claims and measurements, from result files made up here; and the committed one, which must be what
the results say.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastcifar.errors import FastcifarError
from fastcifar.many.results import SCHEMA, Row, Summary, read_rows, recipe_settings, summaries, write_rows
from fastcifar.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "results_table"
MARKERS = "<!-- tools/results_table -->", "<!-- end of tools/results_table -->"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True)


def row(
    recipe: str,
    seed: int = 0,
    accuracy: float = 0.9,
    *,
    epochs: int | None = None,
    average: float | None = None,
    **changes,
) -> Row:
    own = RECIPES[recipe].config
    known = {
        "recipe": recipe,
        "epochs": epochs or own.epochs,
        "full_length": epochs is None,
        "seed": seed,
        "settings": recipe_settings(own),
        "test_accuracy": accuracy,
        "averaged_test_accuracies": {} if average is None else {"ema-0.999": average},
        "watched_test_accuracy": None,
        "seconds": 100.0,
        "images_per_second": 1e4,
        "device": "a GPU",
        "versions": {"torch": "2.11"},
        "commit": None,
    }
    return Row(**known | changes)


@pytest.fixture
def root(tmp_path) -> Path:
    """A checkout with a README that has the markers, and a file of benchmarks beside the results."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "speeds.json").write_text('{"machine": {}, "benchmarks": []}')
    (tmp_path / "README.md").write_text("before\n" + "\n".join(MARKERS) + "\nafter\n")
    return tmp_path


def written(root: Path, rows: list[Row]) -> tuple[dict[str, list[list[str]]], str]:
    """The cells of each line of RESULTS.md by the recipe it begins with, and the README, after the tool has written
    them.
    """
    write_rows(root / "benchmarks" / "results" / "made_up.json", rows)
    done = run_tool("--root", str(root))
    assert (done.returncode, done.stderr) == (0, "")
    cells: dict[str, list[list[str]]] = {}
    for text in (root / "RESULTS.md").read_text().splitlines():
        if text.startswith("| `"):
            line = [cell.strip() for cell in text.strip("|").split("|")]
            cells.setdefault(line[0].strip("`"), []).append(line[1:])
    return cells, (root / "README.md").read_text()


def test_every_recipe_has_a_line_and_one_sentence_says_what_is_not_measured(root):
    cells, readme = written(root, [])
    assert list(cells) == list(RECIPES)
    assert cells["r1_resnet_prop_standard"] == [["R1 T5", "95.15", *[""] * 7]]
    assert (root / "RESULTS.md").read_text().count("not yet measured") == 1
    assert readme.count("not yet measured") == 1
    assert readme.startswith("before\n" + MARKERS[0])
    assert readme.endswith(MARKERS[1] + "\nafter\n")
    assert "| `r4_final` | 96.10 |  |" in readme


def test_mean_spread_and_verdict(root):
    accuracies = [0.950, 0.952, 0.957]
    rows = [
        row("r1_resnet_prop_standard", seed, accuracy, watched_test_accuracy=0.958)
        for seed, accuracy in enumerate(accuracies)
    ]
    rows.append(row("r2_200_epochs", 0, 0.5, average=0.9105))
    cells, readme = written(root, rows)
    assert cells["r1_resnet_prop_standard"] == [
        ["R1 T5", "95.15", "3", "**95.30 ± 0.36**", "", "95.80 ± 0.00", "met", "100", "a GPU"],
    ]
    assert cells["r2_200_epochs"] == [["R2 F4", "91.19", "1", "50.00", "**91.05**", "", "met", "100", "a GPU"]]
    assert "| `r1_resnet_prop_standard` | 95.15 | 95.30 ± 0.36 | 3 | met | 100 | a GPU |" in readme
    assert "| `r2_200_epochs` | 91.19 | 91.05 | 1 | met | 100 | a GPU |" in readme


@pytest.mark.parametrize(
    ("accuracies", "met"),
    [
        ([0.9495], True),
        ([0.9494], False),
        ([0.9494, 0.9496], True),
        ([0.949, 0.950, 0.951], False),
        ([0.945, 0.951, 0.957], True),
        ([0.9515, 0.9515, 0.9515], True),
    ],
)
def test_met_is_the_claim_less_the_spread(accuracies, met):
    """The claim is 95.15; below three runs the spread is 0.2 points."""
    rows = tuple(row("r1_resnet_prop_standard", seed, accuracy) for seed, accuracy in enumerate(accuracies))
    assert Summary(rows).met is met


def test_no_verdict_where_the_claim_is_of_something_else():
    for entry in (row("r5_ensemble_member"), row("quickstart"), row("r1_resnet_prop_standard", epochs=15)):
        assert Summary((entry,)).met is None


def test_other_lengths_stand_apart_with_their_length(root):
    cells, readme = written(
        root, [row("r1_resnet20_standard", seed, 0.86, epochs=15, average=0.861) for seed in (0, 1)]
    )
    first, second = cells["r1_resnet20_standard"]
    assert not any(first[2:])
    assert second == ["15", "200", "2", "86.00 ± 0.00", "86.10 ± 0.00", "100", "a GPU"]
    assert "86.00" not in readme


def test_devices_are_not_mixed():
    rows = [row("quickstart", 1, device="B"), row("quickstart", 0, device="A"), row("quickstart", 0, device="B")]
    assert [[(entry.device, entry.seed) for entry in group.rows] for group in summaries(rows)] == [
        [("A", 0)],
        [("B", 0), ("B", 1)],
    ]


def test_check_tells_what_differs(root):
    written(root, [])
    assert run_tool("--check", "--root", str(root)).returncode == 0
    write_rows(root / "benchmarks" / "results" / "made_up.json", [row("r1_resnet20_standard")])
    done = run_tool("--check", "--root", str(root))
    assert done.returncode == 1
    assert done.stderr == "RESULTS.md is not what the results say; run tools/results_table.\n"
    (root / "README.md").write_text((root / "README.md").read_text().replace("not yet measured", "99"))
    assert "README.md is not what the results say" in run_tool("--check", "--root", str(root)).stderr


def test_a_readme_without_markers_is_refused_and_left_alone(root):
    (root / "README.md").write_text("nothing here\n")
    done = run_tool("--root", str(root))
    assert done.returncode == 1
    assert f"README.md needs the lines {MARKERS[0]} and {MARKERS[1]}" in done.stderr
    assert (root / "README.md").read_text() == "nothing here\n"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("quickstart", settings={"lr": 0.3})], "quickstart, 5 epochs, seed 0, is of that recipe as it used to be"),
        ([row("quickstart", epochs=6, full_length=True)], "is of that recipe as it used to be"),
        ([replace(row("quickstart"), recipe="gone")], "gone, 5 epochs, seed 0, is of no recipe that there is"),
        ([row("quickstart"), row("quickstart")], "quickstart, 5 epochs, seed 0, is there twice on a GPU"),
    ],
)
def test_rows_that_mislead_are_refused(root, rows, expected):
    write_rows(root / "benchmarks" / "results" / "made_up.json", rows)
    done = run_tool("--root", str(root))
    assert done.returncode == 1
    assert expected in done.stderr
    assert not (root / "RESULTS.md").exists()


def test_rows_in_a_file(tmp_path):
    path = tmp_path / "rows.json"
    assert read_rows(path) == []
    rows = [row("quickstart", 1, average=0.91), row("quickstart", 0)]
    write_rows(path, rows)
    assert read_rows(path) == rows[::-1]
    path.write_text(json.dumps({"schema": SCHEMA, "rows": [{"recipe": "quickstart"}]}))
    with pytest.raises(FastcifarError, match=r"rows.json cannot be read \(rows.json lacks .*averaged_test_accuracies"):
        read_rows(path)
    path.write_text("{")
    with pytest.raises(FastcifarError, match="delete it, or mend it"):
        read_rows(path)


def test_the_committed_tables_are_what_the_results_say():
    done = run_tool("--check")
    assert (done.returncode, done.stderr) == (0, "")
