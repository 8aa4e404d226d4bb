"""Every claim of the reports, as one page lists them, has its recipe, and no recipe claims anything else."""

from pathlib import Path

import pytest

from fastcifar.recipes import RECIPES

PAGE = Path(__file__).parents[2] / "docs" / "claims.md"
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text("utf-8").splitlines()]
CLAIMS = [(report, item, claim, recipe.strip("`")) for report, item, claim, recipe, _ in filter(None, ROWS)][2:]


@pytest.mark.parametrize(("report", "item", "claim", "recipe"), CLAIMS)
def test_each_claim_has_its_recipe(report, item, claim, recipe):
    entry = RECIPES[recipe]
    assert entry.source.startswith(report)
    assert entry.claim == (pytest.approx(float(claim) / 100, abs=6e-5) if claim else None)


def test_recipes_claim_what_the_reports_do():
    """A mended recipe, and one of our own, has the claim of the one that it mends or is to reach."""
    claimed = {round(float(claim), 2) for *_, claim, _ in CLAIMS if claim}
    assert {round(100 * entry.claim, 2) for entry in RECIPES.values() if entry.claim} == claimed


def test_all_cells_of_report_5s_table_and_all_reports_are_there():
    assert len([item for report, item, *_ in CLAIMS if report == "R5" and item.startswith("T1")]) == 24
    assert {report for report, *_ in CLAIMS} == {"R1", "R2", "R3", "R4", "R5"}
    assert len({recipe for *_, recipe in CLAIMS}) == len(CLAIMS)
