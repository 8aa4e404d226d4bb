"""The documents agree with the code: commands parse, the reference is up to date, the examples run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

from fastcifar.cli import parse
from fastcifar.config import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md"]
EXAMPLES = sorted(ROOT.glob("docs/examples/*.py"))


def commands() -> list[str]:
    blocks = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
    return sorted({command for block in blocks for command in re.findall(r"\bfastcifar [a-z].*", block)})


@pytest.mark.parametrize("command", commands())
def test_every_command_in_the_documents_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/config.json").write_text(RunConfig().to_json())
    assert parse(shlex.split(command)[1:]) is not None


@pytest.mark.parametrize("page", ["commands.md", "settings.md", "python.md"])
def test_the_reference_is_up_to_date(page):
    wanted = run_path(str(ROOT / "tools/reference"))["pages"]()[page]
    assert (ROOT / "docs/reference" / page).read_text("utf-8") == wanted, "run tools/reference"


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs(example, tmp_path):
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
