"""One rule for every command: code that a file names runs only with --trust, and what is typed needs none."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import SIZE, make_data, make_run

from fastcifar import cli
from fastcifar.config import ModelConfig
from fastcifar.runs.folder import Run

TEACH = "train --dataset data.npz --arch resnet --blocks 1 --channels 4 --batch-size 20 --device cpu --teacher run"
FROM_FILES = [
    "train --config run/config.json",
    "train --resume run",
    TEACH,
    "profile --config run/config.json",
    "plan --config run/config.json",
    "eval run",
    "predict run --images data.npz",
    "ensemble other run",
    "export run --format torch",
]


@pytest.fixture(autouse=True)
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a run whose network is built by a module in the current folder, which refuses as soon as it is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    Path("stranger.py").write_text("def net():\n    raise RuntimeError('I was called')\n")
    data = make_data(tmp_path)
    make_run(tmp_path / "other", data)
    run = Run(make_run(tmp_path / "run", data, arch="stranger:net", options={"image_size": SIZE}))
    run.write_config(replace(run.config(), model=ModelConfig("stranger:net"), batch_size=20))


@pytest.mark.parametrize("command", FROM_FILES)
def test_a_strangers_code_runs_only_where_it_is_trusted(command, capsys):
    assert cli.main(command.split()) == 2
    assert "'stranger:net', code that would be executed; add --trust" in capsys.readouterr().err
    assert "stranger" not in sys.modules
    assert cli.main([*command.split(), "--trust"]) == 2
    assert "I was called" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["count", "train --config run/config.json"])
def test_what_is_typed_needs_no_trust(command, capsys):
    assert cli.main([*command.split(), "--arch", "stranger:net"]) == 2
    assert "I was called" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("reproduce quickstart --out here", "here/quickstart/seed0"),
        ("ensemble --recipe quickstart --out here", "here/seed0"),
    ],
)
def test_a_strangers_run_is_not_taken_for_a_recipes(command, place, capsys):
    shutil.copytree("run", place)
    assert cli.main(command.split()) == 2
    assert f"{place} holds a run of quickstart as that recipe used to be (arch, " in capsys.readouterr().err
    assert "stranger" not in sys.modules
