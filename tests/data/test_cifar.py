from __future__ import annotations

import gzip
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_cifar import Tiny, form_of, pack, statistics

from fastcifar.data import cifar
from fastcifar.data.cifar import CIFAR10, CIFAR100, read_cifar
from fastcifar.errors import DataError


@pytest.mark.parametrize("source", ["folder", "archive"])
def test_reads_what_was_written(tiny: Tiny, tmp_path: Path, source: str) -> None:
    train = read_cifar(tiny.form, getattr(tiny, source)(tmp_path), "train")
    assert train.images.is_contiguous()
    assert np.array_equal(train.images.numpy(), tiny.images)
    assert train.labels.tolist() == tiny.labels
    assert train.classes == ("ant", "bee", "cow")
    assert (train.mean, train.std) == (tiny.form.mean, tiny.form.std)
    assert len(read_cifar(tiny.form, tmp_path / getattr(tiny.form, source), "test")) == 10


def test_reading_an_archive_writes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    read_cifar(tiny.form, tiny.archive(tmp_path), "train")
    assert [path.name for path in tmp_path.iterdir()] == [tiny.form.archive]


def test_fine_labels_of_cifar100(tmp_path: Path) -> None:
    rows = np.zeros((3, 3072), np.uint8)
    batch = {b"data": rows, b"fine_labels": [0, 1, 0], b"coarse_labels": [0, 0, 0]}
    meta = {b"fine_label_names": [b"apple", b"bear"], b"coarse_label_names": [b"thing"]}
    files = {"batches.meta": pickle.dumps(meta, 4), "data_batch_1": pickle.dumps(batch, 4), "test_batch": b""}
    form = replace(form_of(files), label_key=CIFAR100.label_key, classes_key=CIFAR100.classes_key)
    train = read_cifar(form, Tiny(form, files, rows, []).folder(tmp_path), "train")
    assert train.labels.tolist() == [0, 1, 0]
    assert train.classes == ("apple", "bear")


@pytest.mark.parametrize("name", ["data_batch_2", "batches.meta"])
def test_a_changed_file_is_named_before_it_is_unpickled(
    tiny: Tiny, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "unpickle", lambda data, path: pytest.fail(f"unpickled {path}"))
    folder = tiny.folder(tmp_path)
    (folder / name).write_bytes(tiny.files[name][:-2] + b"!.")
    message = rf"{name} is damaged: its md5 is \w{{32}}, expected \w{{32}}; delete .* and run again\.$"
    with pytest.raises(DataError, match=message):
        read_cifar(tiny.form, folder, "train")


def test_a_missing_batch_is_named(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path)
    (folder / "data_batch_2").unlink()
    with pytest.raises(DataError, match=r"data_batch_2 cannot be read \(No such file"):
        read_cifar(tiny.form, folder, "train")


HOSTILE = {
    "empty": lambda packed: b"",
    "truncated": lambda packed: packed[:-1],
    "one bit": lambda packed: packed[:1000] + bytes([packed[1000] ^ 1]) + packed[1001:],
    "endless headers": lambda packed: gzip.compress(b"comment=" + bytes(2**24)),
    "foreign": lambda packed: pack({f"{CIFAR10.folder}/data_batch_1": b"hello"}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_nothing_of_another_archive_is_unpacked(
    tiny: Tiny, tmp_path: Path, change: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "unpack", lambda *_: pytest.fail("unpacked"))
    archive = tmp_path / tiny.form.archive
    archive.write_bytes(change(tiny.packed()))
    with pytest.raises(DataError, match=rf"^{archive} is damaged: its md5 is .*; delete {archive} and run again\.$"):
        read_cifar(tiny.form, archive, "train")


@pytest.mark.parametrize("source", ["folder", "archive"])
def test_a_file_of_any_size_is_refused_at_once(
    tiny: Tiny, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "LARGEST_FILE", 2**20)
    place = getattr(tiny, source)(tmp_path)
    os.truncate(place / "data_batch_1" if source == "folder" else place, 2**40)
    with pytest.raises(DataError, match="is damaged"):
        read_cifar(tiny.form, place, "train")


@pytest.mark.data
@pytest.mark.parametrize("split", ["train", "test"])
def test_equals_torchvision(split: str, real_cifar: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.datasets.CIFAR10(str(real_cifar), train=split == "train")
    ours = read_cifar(CIFAR10, real_cifar / CIFAR10.folder, split)
    assert np.array_equal(ours.images.numpy(), theirs.data)
    assert ours.labels.tolist() == theirs.targets
    assert list(ours.classes) == theirs.classes
    if split == "train":
        mean, std = statistics(ours.images)
        assert mean == pytest.approx(ours.mean, abs=5e-5)
        assert std == pytest.approx(ours.std, abs=5e-5)
