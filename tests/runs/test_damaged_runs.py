"""Reading any run folder returns its content or one sentence: which file, what is wrong, what to do."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import CONFIG, NETWORK, RESULT, record
from safetensors.torch import load_file, save_file

from fastcifar.errors import FastcifarError
from fastcifar.runs import checkpoint as checkpoints
from fastcifar.runs.folder import Run
from fastcifar.runs.network import read_network
from fastcifar.runs.records import JsonLines, read_records

CHECKPOINT = Path("checkpoints/00000008")
WEIGHTS = CHECKPOINT / "weights.safetensors"
TENSORS = ["weights", "ema-0.999", "best-weights", "state"]
PROGRESS_FILE = str(CHECKPOINT / "progress.json")
FILES = [*(str(CHECKPOINT / f"{name}.safetensors") for name in TENSORS), PROGRESS_FILE]
READERS: dict[str, Callable[[Run], object]] = {
    "config.json": Run.config,
    "result.json": Run.result,
    "metrics.jsonl": lambda run: read_records(run.metrics),
    **{name: lambda run: checkpoints.load(run.checkpoints) for name in FILES},
}


@pytest.fixture
def earlier(run: Run) -> Run:
    """A run of an earlier version, which noted no digests."""
    (run.path / CHECKPOINT / "SHA256SUMS").unlink()
    return run


def sentence(read: Callable[[], object]) -> str:
    with pytest.raises(FastcifarError) as caught:
        read()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 1000
    return text


def test_a_whole_run_is_read(run: Run) -> None:
    assert run.config() == CONFIG
    assert run.result() == RESULT
    assert read_records(run.metrics) == [record(1), record(2)]


@pytest.mark.parametrize("name", READERS)
def test_foreign_content(earlier: Run, name: str) -> None:
    for content in (b"\xff\xfe\x00\n", b"{\n", b"[" * 100_000 + b"\n", b"null\n", b"7\n", b'{"surprise": 1}\n'):
        (earlier.path / name).write_bytes(content)
        assert sentence(lambda: READERS[name](earlier)).startswith(f"{earlier.path / name}")


@pytest.mark.parametrize("name", [*FILES, str(CHECKPOINT / "SHA256SUMS")])
def test_a_flipped_bit_in_a_checkpoint_is_noticed(run: Run, name: str) -> None:
    whole, draw = (run.path / name).read_bytes(), random.Random(0)
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (run.path / name).write_bytes(damaged)
        assert f"{run.path / CHECKPOINT}" in sentence(lambda: checkpoints.load(run.checkpoints))


@pytest.mark.parametrize("name", READERS)
def test_what_never_ends_is_not_read(run: Run, name: str) -> None:
    (run.path / name).unlink()
    (run.path / name).symlink_to("/dev/zero")
    assert "it is no regular file" in sentence(lambda: READERS[name](run))


def test_missing_files_of_a_checkpoint(run: Run) -> None:
    for name in FILES:
        content = (run.path / name).read_bytes()
        (run.path / name).unlink()
        text = sentence(lambda: checkpoints.load(run.checkpoints))
        assert text.startswith(f"{run.path / name} cannot be read (")
        assert text.endswith("; start the run again.")
        (run.path / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("config.json", {"seed": ...}, "config.json lacks seed"),
        ("config.json", {"optim": {"lr": 0.5}}, "config.json: optim lacks optimizer, scale_lr"),
        ("config.json", {"epochs": 0}, "config.json: epochs is 0; expected 1 or more"),
        ("config.json", {"epochs": "x" * 10_000}, "epochs is 'xxx"),
        ("config.json", {"batchsize": 1}, "unknown key 'batchsize'; did you mean batch_size"),
        ("result.json", {"seconds": "3"}, "seconds is '3'; expected float"),
        ("result.json", {"versions": ["3"]}, "versions is ['3']; expected dict[str, str]"),
        ("result.json", {"seconds_by_phase": {"train": None}}, "seconds_by_phase: train is None; expected float"),
        (PROGRESS_FILE, {"epoch": ..., "scaler": ...}, "progress.json lacks epoch, scaler"),
        (PROGRESS_FILE, {"epoch": "2"}, "epoch is '2'; expected int"),
    ],
)
def test_entries_that_do_not_fit(earlier: Run, name: str, changes: dict[str, Any], expected: str) -> None:
    """Where a change is to `...`, the entry is removed."""
    content = json.loads((earlier.path / name).read_text()) | changes
    (earlier.path / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    text = sentence(lambda: READERS[name](earlier))
    assert text.startswith(f"{earlier.path / name} cannot be read (")
    assert expected in text


@pytest.mark.parametrize("line", ['{"epoch": 1}', '{"epoch": ', "[]", json.dumps(vars(record(1)) | {"colour": "red"})])
def test_broken_lines_of_metrics(run: Run, line: str) -> None:
    whole = run.metrics.read_text()
    run.metrics.write_text(whole + line + "\n")
    for read in (lambda: read_records(run.metrics), lambda: JsonLines(run.metrics, 2)):
        text = sentence(read)
        assert text.startswith(f"{run.metrics}, line 3, cannot be read (")
        assert text.endswith("; delete the line.")
    run.metrics.write_text(whole + line)
    assert read_records(run.metrics) == [record(1), record(2)]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, "network lacks arch, options, classes, mean, std"),
        ({"network": "null"}, "network is None; expected an object"),
        ({"network": "{"}, "Expecting property name"),
        ({"arch": 7}, "arch is 7; expected str"),
        ({"options": [1]}, "options is [1]; expected dict[str, typing.Any]"),
        ({"classes": [0, 1]}, "classes is 0; expected str"),
        ({"mean": [0.1, 0.2]}, "mean is [0.1, 0.2]; expected tuple[float, float, float]"),
        ({"mean": [0.1, 0.2, float("nan")]}, "mean is nan; expected 0 to 1"),
        ({"std": [0.1, 0, 0.1]}, "std is 0.0; expected above 0, at most 1"),
        ({"arch": "resnte"}, "unknown architecture 'resnte'; did you mean resnet"),
        ({"options": {"name": "x"}}, "multiple values for argument 'name'"),
        ({"options": {"blocks": "abc", "channels": [1, 2, 3]}}, "cannot be built"),
        ({"options": {"blocks": None}}, "cannot be built"),
        ({"options": {"blocks": [1], "channels": [10**12]}}, "cannot be built"),
        ({"options": {"width": 3}}, "does not read the option 'width'"),
        ({"options": {"blocks": [1, 1], "channels": [4, 16]}}, "has stage2.0"),
    ],
    ids=str,
)
def test_networks_that_are_none(earlier: Run, metadata: dict[str, Any] | None, expected: str) -> None:
    weights = earlier.path / WEIGHTS
    if metadata and "network" not in metadata:
        metadata = {"network": json.dumps(NETWORK | metadata)}
    save_file(load_file(weights), weights, metadata)
    text = sentence(lambda: read_network(earlier.path).load(torch.device("cpu"), "weights"))
    assert text.startswith(str(earlier.path))
    assert expected in text
