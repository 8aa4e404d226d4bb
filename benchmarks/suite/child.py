"""Measures one item, in the process that the suite starts for it: TARGET ITEM SETTINGS FOLDER; the rows go to FOLDER/rows.json."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastcifar.registry import load
from fastcifar.runs.files import write_text
from fastcifar.serialization import build
from suite.records import PartlyFailed, Settings


def main(target: str, item: str, settings: str, folder: str) -> None:
    """Leaves no rows where the item fails, and those that there are where it fails in part; either error is raised on."""
    try:
        rows = load(target)(item, build(Settings, json.loads(settings), "the settings"), Path(folder))
        keep(rows, Path(folder))
    except PartlyFailed as error:
        keep(error.rows, Path(folder))
        raise


def keep(rows: list[Any], folder: Path) -> None:
    write_text(folder / "rows.json", json.dumps([asdict(row) for row in rows], allow_nan=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
