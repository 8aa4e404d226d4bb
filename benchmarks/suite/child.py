"""Measures one item, in the process that the suite starts for it: TARGET ITEM SETTINGS FOLDER; the rows go to FOLDER/rows.json."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from fastcifar.registry import load
from fastcifar.runs.files import write_text
from fastcifar.serialization import build
from suite.records import Settings


def main(target: str, item: str, settings: str, folder: str) -> None:
    rows = load(target)(item, build(Settings, json.loads(settings), "the settings"), Path(folder))
    write_text(Path(folder) / "rows.json", json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main(*sys.argv[1:])
