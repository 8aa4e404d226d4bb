"""The table of what each loader does by what is that of the code."""

from pathlib import Path
from runpy import run_path

import pytest


def test_the_table_in_the_readme_is_up_to_date():
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    root = Path(__file__).parents[2]
    tool = run_path(str(root / "tools" / "loader_table"))
    committed = (root / "README.md").read_text()
    assert tool["replaced"](committed) == committed, "run tools/loader_table --write README.md"
