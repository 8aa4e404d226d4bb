"""Rows of finished runs: their summary, whether that meets the claim, and their file."""

import json

import pytest
from made_row import row

from fastcifar.errors import FastcifarError
from fastcifar.many.results import SCHEMA, Summary, read_rows, summaries, write_rows


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


def test_an_ensembles_claim_is_compared_with_the_vote_of_most_members():
    """The claim is 97.68, and one vote's spread is 0.2 points."""
    votes = [None, 0.9, 0.975]
    rows = tuple(row("r5_ensemble_member", seed, 0.9, vote=vote) for seed, vote in enumerate(votes))
    assert Summary(rows).compared == [0.975]
    assert Summary(rows).met
    assert not Summary(rows[:2]).met
    assert Summary(rows[:1]).met is None


def test_no_verdict_where_the_claim_is_of_something_else():
    for entry in (row("r5_ensemble_member"), row("quickstart"), row("r1_resnet_prop_standard", epochs=15)):
        assert Summary((entry,)).met is None


def test_devices_are_not_mixed():
    rows = [row("quickstart", 1, device="B"), row("quickstart", 0, device="A"), row("quickstart", 0, device="B")]
    groups = [[(entry.device, entry.seed) for entry in group.rows] for group in summaries(rows)]
    assert groups == [[("A", 0)], [("B", 0), ("B", 1)]]


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
