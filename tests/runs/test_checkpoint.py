"""Checkpoints are whole or absent, and hold nothing that could execute."""

import errno
import hashlib
import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_run import NETWORK, PROGRESS
from made_run import checkpoint as state
from safetensors import safe_open
from safetensors.torch import load_file

from fastcifar.errors import FastcifarError
from fastcifar.models import build_model
from fastcifar.optim.averaging import Buckets
from fastcifar.runs import checkpoint as checkpoints
from fastcifar.runs.checkpoint import copy_tensors
from fastcifar.runs.folder import Run

FILES = ["weights", "ema-0.999", "best-weights", "state"]


def small_network() -> torch.nn.Module:
    return build_model(NETWORK["arch"], **NETWORK["options"]).to(memory_format=torch.channels_last)


def test_round_trip(tmp_path):
    """The bytes are the same each time, and the metadata is JSON alone."""
    assert checkpoints.load(tmp_path) is None
    saved = state(7)
    for folder in ("a", "b"):
        checkpoints.save(tmp_path / folder, saved)
    loaded = checkpoints.load(tmp_path / "a")
    assert (loaded.progress, loaded.network) == (PROGRESS | {"step": 7}, NETWORK)
    assert list(loaded.files()) == list(saved.files()) == FILES
    for file, tensors in saved.files().items():
        assert loaded.files()[file].keys() == tensors.keys()
        assert all(torch.equal(loaded.files()[file][key], tensor) for key, tensor in tensors.items())
    stored, other = ((tmp_path / name / "00000007" / "weights.safetensors").read_bytes() for name in ("a", "b"))
    assert stored == other
    for line in (tmp_path / "a" / "00000007" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "a" / "00000007" / name).read_bytes()).hexdigest() == digest
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    assert json.loads(header["__metadata__"]["network"]) == json.loads(json.dumps(NETWORK))


def test_a_run_without_average_or_best_weights(tmp_path):
    saved = state(7)
    assert saved.chosen == {"weights": saved.best["weights"], "ema-0.999": saved.weights["ema-0.999"]}
    weights, progress = {"weights": saved.weights["weights"]}, {**saved.progress, "averages": [], "best": {}}
    checkpoints.save(tmp_path, replace(saved, weights=weights, best={}, progress=progress))
    loaded = checkpoints.load(tmp_path)
    assert (list(loaded.weights), loaded.best) == (["weights"], {})


@pytest.mark.parametrize("name", ["../secret", "state", "ema-", ""])
def test_names_that_no_weights_have_are_not_opened(tmp_path, name):
    checkpoints.save(tmp_path, state(7))
    progress = tmp_path / "00000007" / "progress.json"
    progress.write_text(progress.read_text().replace('"ema-0.999"', json.dumps(name)))
    (tmp_path / "00000007" / "SHA256SUMS").unlink()
    with pytest.raises(FastcifarError, match="which no weights are called"):
        checkpoints.load(tmp_path)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [SystemExit("killed"), FULL], ids=["killed", "full"])
@pytest.mark.parametrize("fatal", ["fsync", "replace"])
@pytest.mark.parametrize("after", range(7))
def test_a_save_that_dies_or_fails_anywhere_leaves_the_one_before(tmp_path, monkeypatch, fatal, after, error):
    """A full disk is one sentence and leaves nothing else; the next save leaves only itself."""
    checkpoints.save(tmp_path, state(1))
    calls, genuine = iter(range(100)), getattr(os, fatal)

    def die(*arguments):
        if next(calls) >= after:
            raise error
        return genuine(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, fatal, die)
        with (
            suppress(SystemExit),
            pytest.raises(FastcifarError, match=r" cannot be written \(No space left on device\); "),
        ):
            checkpoints.save(tmp_path, state(2))
    if error is FULL:
        assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    assert checkpoints.load(tmp_path).progress["step"] == 1
    checkpoints.save(tmp_path, state(3))
    assert [path.name for path in tmp_path.iterdir()] == ["00000003"]


def test_weights_of_a_network_in_training_are_contiguous_under_its_own_names(tmp_path):
    """The network is compiled, and its tensors are channels_last views of one bucket."""
    names, model = list(small_network().state_dict()), small_network()
    Buckets(model)
    model.compile()
    saved = state()
    checkpoints.save(tmp_path, replace(saved, weights={**saved.weights, "weights": dict(model.state_dict())}))
    file = tmp_path / "00000008" / "weights.safetensors"
    with safe_open(file, "pt") as stored:
        assert sorted(stored.keys()) == sorted(names)
        assert all(stored.get_tensor(name).is_contiguous() for name in names)
    plain = build_model(NETWORK["arch"], **NETWORK["options"])
    plain.load_state_dict(load_file(file))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_loading_keeps_the_models_memory_format():
    saved, model = state(), small_network()
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    stored = {key: tensor.contiguous() for key, tensor in saved.weights["weights"].items()}
    copy_tensors(stored, model.state_dict(), "here")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved.weights["weights"][name])
        assert tensor.stride() == strides[name]
    assert model.stage2[0].branch[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({}, "here lacks a; "),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, "here has an unknown b; "),
        ({"a": torch.zeros(3, 2)}, r"here has a as float32 \(3, 2\), expected float32 \(2, 3\); "),
        ({"a": torch.zeros(2, 3, dtype=torch.uint8)}, r"here has a as uint8 \(2, 3\), expected float32 \(2, 3\); "),
    ],
)
def test_tensors_that_do_not_fit_are_refused(stored, expected):
    own = {"a": torch.ones(2, 3)}
    with pytest.raises(FastcifarError, match=expected):
        copy_tensors(stored, own, "here")
    assert own["a"].all()


def test_what_others_put_beside_a_checkpoint_stays(tmp_path):
    checkpoints.save(tmp_path, state(1))
    for name in ("best", "2024", ".hidden", "00000001-copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
    for name in ("00000000", ".00000000.partial"):
        (tmp_path / name).mkdir()
    checkpoints.save(tmp_path, state(2))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".hidden", "00000001-copy", "00000002", "2024", "best"}


def test_links_are_neither_followed_nor_taken_for_checkpoints(tmp_path):
    (outside := tmp_path / "outside" / "00000001").mkdir(parents=True)
    (outside / "mine.txt").touch()
    run = Run(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    for name in ("00000001", "99999999", ".00000003.partial"):
        (run.checkpoints / name).symlink_to(outside)
    assert checkpoints.load(run.checkpoints) is None
    checkpoints.save(run.checkpoints, state(2))
    assert checkpoints.load(run.checkpoints).progress["step"] == 2
    checkpoints.save(run.checkpoints, state(3))
    run.checkpoints.rename(tmp_path / "moved")
    (run.path / "checkpoints").symlink_to(tmp_path / "moved")
    with pytest.raises(FastcifarError, match="is a link that may lead out of"):
        checkpoints.save(run.checkpoints, state(4))
    assert [path.name for path in outside.iterdir()] == ["mine.txt"]
    assert (tmp_path / "moved" / "00000003").is_dir()


def test_what_cannot_be_read_is_not_taken_for_absent(tmp_path, monkeypatch):
    """A run must not begin anew since its checkpoint is out of reach."""
    checkpoints.save(tmp_path, state(1))
    (tmp_path / "file").touch()
    with pytest.raises(FastcifarError, match="file cannot be read"):
        checkpoints.load(tmp_path / "file")

    def denied(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for place, name in ((Path, "lstat"), (os, "scandir")):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, denied)
            with pytest.raises(FastcifarError, match=r"\(Permission denied\)"):
                checkpoints.load(tmp_path)


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    """It has a file that names it and no digests."""
    checkpoints.save(tmp_path, state(1))
    (tmp_path / "latest").write_text("00000001\n")
    (tmp_path / "00000001" / "SHA256SUMS").unlink()
    assert checkpoints.load(tmp_path).progress["step"] == 1
    checkpoints.save(tmp_path, state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["00000002"]
    progress = {**PROGRESS, "images": {"train": "one", "test": "two"}, "step": 3}
    checkpoints.save(tmp_path, replace(state(3), progress=progress))
    (tmp_path / "00000003" / "SHA256SUMS").unlink()
    with pytest.raises(FastcifarError, match="SHA256SUMS is missing"):
        checkpoints.load(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not name open files")
def test_all_is_on_disk_before_it_is_published(tmp_path, monkeypatch):
    events, genuine = [], os.replace

    def rename(old: Path, new: Path) -> None:
        genuine(old, new)
        events.append(f"-> {new.name}")

    monkeypatch.setattr(os, "fsync", lambda file: events.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    monkeypatch.setattr(os, "replace", rename)
    checkpoints.save(tmp_path, state(1))
    expected = []
    for file in (*(f"{name}.safetensors" for name in FILES), "progress.json", "SHA256SUMS"):
        expected += [f".{file}.partial", f"-> {file}", ".00000001.partial"]
    assert events == [*expected, "-> 00000001", tmp_path.name]
