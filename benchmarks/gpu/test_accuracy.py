"""Whole runs of recipes, whose rows go beside the results as `results.json`, which `tools/tables` reads."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fastcifar.data.sources import find
from fastcifar.many.results import read_rows, write_rows
from fastcifar.recipes import RECIPES
from fastcifar.recipes.registry import derive

RUNS = Path(__file__).resolve().parents[2] / "runs" / "gpu_suite"
SMALL = {"arch": "resnet", "blocks": (1,), "channels": (4,), "dataset": "synthetic", "batch_size": 10, "epochs": 1}


@pytest.mark.takes(30)  # one that is stopped goes on from its last checkpoint
@pytest.mark.parametrize("recipe", ["r1_resnet_prop_standard", "r1_resnet20_standard"])
def test_recipe(recipe, record_property, request, tmp_path, monkeypatch, fastcifar, tiny):
    if tiny:
        small = replace(RECIPES[recipe], config=derive(RECIPES[recipe].config, **SMALL))
        monkeypatch.setitem(RECIPES, recipe, small)
    elif find("cifar10") is None:
        pytest.skip("CIFAR-10 is not at hand; name its folder in FASTCIFAR_DATA")
    runs, kept = tmp_path if tiny else RUNS, request.config.getoption("results").with_name("results.json")
    runs.mkdir(parents=True, exist_ok=True)
    if kept.exists() and not (runs / kept.name).exists():
        shutil.copy(kept, runs)
    fastcifar("reproduce", recipe, "--out", str(runs), *(["--compile", "off"] if tiny else []))
    commit = request.config.getoption("commit")
    rows = [replace(row, commit=row.commit or commit) for row in read_rows(runs / kept.name)]
    write_rows(kept, rows)
    row = next(row for row in rows if row.recipe == recipe)
    for name in ("test_accuracy", "seconds", "images_per_second"):
        record_property(name, getattr(row, name))
