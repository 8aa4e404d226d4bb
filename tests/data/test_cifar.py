from __future__ import annotations

import pickle
import tarfile
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
@pytest.mark.parametrize("source", ["folder", "archive"])
def test_a_changed_file_is_named_before_it_is_unpickled(
    tiny: Tiny, tmp_path: Path, source: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "unpickle", lambda data, path: pytest.fail(f"unpickled {path}"))
    damaged = replace(tiny, files={**tiny.files, name: tiny.files[name][:-2] + b"!."})
    with pytest.raises(
        DataError, match=rf"{name} is damaged: its md5 is \w{{32}}, expected \w{{32}}; delete .* and run again\.$"
    ):
        read_cifar(tiny.form, getattr(damaged, source)(tmp_path), "train")


def test_a_missing_batch_is_named(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path)
    (folder / "data_batch_2").unlink()
    with pytest.raises(DataError, match=r"data_batch_2 cannot be read \(No such file"):
        read_cifar(tiny.form, folder, "train")


def header(name: str, kind: bytes, size: int = 0, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, size, target
    return member


BATCH_1 = f"{CIFAR10.folder}/data_batch_1"
HOSTILE = {
    "symbolic link": ({BATCH_1: header(BATCH_1, tarfile.SYMTYPE, target="/etc/passwd")}, "other than a plain file"),
    "device": ({BATCH_1: header(BATCH_1, tarfile.CHRTYPE)}, "other than a plain file"),
    "huge member": ({BATCH_1: header(BATCH_1, tarfile.REGTYPE, 2**40)}, "more than 512 MiB|damaged"),
    "huge foreign member": ({"other": header("other", tarfile.REGTYPE, 2**40)}, "more than 512 MiB|damaged|lacks"),
    "name that climbs": ({f"../{BATCH_1}": b"a"}, f"lacks .*{BATCH_1}"),
    "foreign": ({"readme.txt": b"hello"}, f"lacks .*{BATCH_1}"),
}


@pytest.mark.parametrize(("members", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_archive(tiny: Tiny, tmp_path: Path, members: dict, message: str) -> None:
    archive = tmp_path / tiny.form.archive
    archive.write_bytes(pack(members))
    with pytest.raises(DataError, match=message) as caught:
        read_cifar(tiny.form, archive, "train")
    assert str(archive) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


@pytest.mark.parametrize("keep", [0, 1, 10, 1000, 0.5, 0.99])
def test_truncated_archive(tiny: Tiny, tmp_path: Path, keep: float) -> None:
    archive, packed = tmp_path / tiny.form.archive, tiny.packed()
    archive.write_bytes(packed[: int(keep * len(packed)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"damaged|lacks"):
        read_cifar(tiny.form, archive, "train" if keep < 0.9 else "test")


@pytest.mark.parametrize("place", range(0, 20_000, 1499))
def test_corrupt_archive(tiny: Tiny, tmp_path: Path, place: int) -> None:
    archive, packed = tmp_path / tiny.form.archive, bytearray(tiny.packed())
    packed[place : place + 8] = b"\xffdamage\x00"
    archive.write_bytes(packed)
    with pytest.raises(DataError, match=r"damaged|lacks|plain file"):
        read_cifar(tiny.form, archive, "train")


def test_endless_headers_stop_early(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "LARGEST_ARCHIVE", 2**20)
    archive = tmp_path / tiny.form.archive
    archive.write_bytes(pack({f"{number:0100}/" * 3: b"" for number in range(1000)}))
    with pytest.raises(DataError, match="more than 1 MiB"):
        read_cifar(tiny.form, archive, "train")


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
