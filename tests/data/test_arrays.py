from __future__ import annotations

import pickle
import re
import struct
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cifar import statistics

from fastcifar.data import memory
from fastcifar.data.arrays import read_arrays
from fastcifar.data.image_set import ImageSet
from fastcifar.data.sources import load_dataset
from fastcifar.errors import DataError

Arrays = dict[str, np.ndarray]


def drawn(height: int = 8, width: int = 8, count: int = 20) -> Arrays:
    """Draws images of three classes, with half as many for the test."""
    random = np.random.default_rng(0)
    return {
        "train_images": random.integers(0, 256, (count, height, width, 3), np.uint8),
        "train_labels": np.arange(count) % 3,
        "test_images": random.integers(0, 128, (count // 2, height, width, 3), np.uint8),
        "test_labels": np.arange(count // 2) % 3,
    }


def save(place: Path, arrays: Arrays, form: str = "npz") -> Path:
    if form == "npz":
        np.savez(place / "own.npz", **arrays)
        return place / "own.npz"
    for name, array in arrays.items():
        np.save(place / f"{name}.npy", array)
    return place


def read_both(path: Path) -> list[ImageSet]:
    return [read_arrays(path, split) for split in ("train", "test")]


@pytest.mark.parametrize(
    ("form", "height", "width"), [("npz", 32, 32), ("folder", 1, 1), ("npz", 7, 13), ("folder", 40, 3)]
)
def test_round_trip(tmp_path: Path, form: str, height: int, width: int) -> None:
    arrays = drawn(height, width)
    path = save(tmp_path, arrays, form)
    mean, std = statistics(torch.from_numpy(arrays["train_images"]))
    for split, count in (("train", 20), ("test", 10)):
        dataset = load_dataset(str(path), split)
        assert dataset.images.shape == (count, height, width, 3)
        assert np.array_equal(dataset.images.numpy(), arrays[f"{split}_images"])
        assert dataset.labels.tolist() == arrays[f"{split}_labels"].tolist()
        assert dataset.classes == ("0", "1", "2")
        assert dataset.mean == pytest.approx(mean, abs=5.1e-5)
        assert dataset.std == pytest.approx(std, abs=5.1e-5)


def test_classes_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, drawn() | {"classes": np.array(["ant", "bee", "牛", "unseen"])}, "folder")
    assert read_arrays(path, "test").classes == ("ant", "bee", "牛", "unseen")


@pytest.mark.parametrize(
    ("layout", "kind"), [("fortran", "u1"), ("strided", ">i4"), ("compressed", "<u8"), ("plain", "i1")]
)
def test_any_integers_and_layout_of_memory(tmp_path: Path, layout: str, kind: str) -> None:
    arrays = drawn(5, 9)
    images = arrays["train_images"][::-1] if layout == "strided" else arrays["train_images"]
    changes = {"train_images": np.asfortranarray(images) if layout == "fortran" else images}
    changes["train_labels"] = arrays["train_labels"].astype(kind)
    path, savez = tmp_path / "own.npz", np.savez_compressed if layout == "compressed" else np.savez
    savez(path, **arrays | changes)
    read = read_arrays(path, "train")
    assert read.images.is_contiguous()
    assert np.array_equal(read.images.numpy(), images)
    assert read.labels.tolist() == arrays["train_labels"].tolist()


IMAGES, LABELS = drawn()["train_images"], drawn()["train_labels"]
REFUSED = {
    "greyscale": (
        {"train_images": IMAGES[..., 0]},
        r"numpy\.repeat\(train_images\.reshape\(-1, 8, 8, 1\), 3, axis=3\) in their place",
    ),
    "one channel": ({"test_images": IMAGES[:10, ..., :1]}, r"test_images\.reshape\(-1, 8, 8, 1\)"),
    "floats": (
        {"train_images": IMAGES / 255},
        r"float64 \(20, 8, 8, 3\); expected uint8 \(N, H, W, 3\), RGB: save bytes from 0 to 255",
    ),
    "channels first": ({"train_images": IMAGES.transpose(0, 3, 1, 2)}, r"save train_images\.transpose\(0, 2, 3, 1\)"),
    "four channels": ({"train_images": np.zeros((20, 8, 8, 4), np.uint8)}, r"uint8 \(20, 8, 8, 4\); expected"),
    "no pixels": ({"train_images": np.zeros((20, 0, 8, 3), np.uint8)}, "holds no pixels"),
    "no images": ({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "holds no pixels"),
    "one colour": ({"train_images": IMAGES * np.array([1, 1, 0], np.uint8)}, "do not vary in every channel"),
    "other test size": ({"test_images": np.zeros((10, 9, 8, 3), np.uint8)}, "different sizes"),
    "too few labels": ({"train_labels": LABELS[:-1]}, "20 train_images and 19 train_labels"),
    "float labels": (
        {"train_labels": LABELS.astype(float)},
        r"train_labels of .* are float64 \(20,\); expected integers \(N,\)",
    ),
    "one-hot labels": (
        {"train_labels": np.eye(3, dtype=int)[LABELS]},
        r"are int64 \(20, 3\); expected integers \(N,\)",
    ),
    "labels from 1": ({"train_labels": LABELS + 1}, "run from 1 to 3; number the 3 classes 0 to 2"),
    "negative labels": ({"train_labels": LABELS - 1}, "run from -1 to 1"),
    "unknown test label": ({"test_labels": LABELS[:10] + 1}, "test_labels of .* run from 1 to 3"),
    "too few names": ({"classes": np.array(["ant", "bee"])}, "run from 0 to 2; number the 2 classes 0 to 1"),
    "names of no characters": ({"classes": np.frombuffer(b"\xff" * 12, "<U1")}, r"classes of .* are no text \(.*\)"),
    "one name": ({"classes": np.array("ant")}, r"classes of .* are <U3 \(\)"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(tmp_path: Path, changes: Arrays, message: str) -> None:
    path = save(tmp_path, drawn() | changes)
    with pytest.raises(DataError, match=message) as caught:
        read_both(path)
    assert str(path) in str(caught.value)
    assert re.search(r"[^.]\.$", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_a_missing_array_is_named(tmp_path: Path, form: str) -> None:
    path = save(tmp_path, {name: array for name, array in drawn().items() if name != "test_labels"}, form)
    with pytest.raises(DataError, match="lacks test_labels; it needs train_images"):
        read_arrays(path, "train")


class Hostile:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(("form", "name"), [("npz", "train_images"), ("folder", "classes")])
def test_nothing_is_unpickled(tmp_path: Path, form: str, name: str) -> None:
    path = save(tmp_path, drawn() | {name: np.array([Hostile()], dtype=object)}, form)
    with pytest.raises(DataError, match=f"{name} of .* cannot be read .*; save it anew, as a plain array without obj"):
        read_arrays(path, "train")


def test_a_bare_pickle_is_not_unpickled(tmp_path: Path) -> None:
    (path := tmp_path / "own.npz").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DataError, match=r"own\.npz is no \.npz file, or a damaged one"):
        read_arrays(path, "train")
    save(tmp_path, drawn(), "folder")
    (tmp_path / "train_images.npy").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DataError, match=r"train_images of .* cannot be read"):
        read_arrays(tmp_path, "train")


def npy(header: bytes, length: int, version: bytes = b"\1\0") -> bytes:
    """The start of a .npy file whose header claims a length."""
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\1\0" else "<I", length) + header


CLAIM = b"{'descr': '|u1', 'fortran_order': False, 'shape': (2147483648,)}\n"
HEADERS = {
    "more than the file has": npy(CLAIM, len(CLAIM)),
    "endless": npy(bytes(2**22), 2**32 - 1, version=b"\2\0"),
    "negative": npy(negative := CLAIM.replace(b"2147483648,", b"-2, -3"), len(negative)) + bytes(6),
    "unknown version": npy(CLAIM, len(CLAIM), version=b"\7\0"),
}


@pytest.mark.parametrize("form", ["npz", "folder"])
@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_takes_no_memory_that_the_file_does_not_have(tmp_path: Path, form: str, content: bytes) -> None:
    path = save(tmp_path, drawn(), form)
    if form == "folder":
        (path / "train_images.npy").write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in drawn():
                archive.writestr(f"{name}.npy", content)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"train_images of .* cannot be read \(.*\); save it anew"):
        read_arrays(path, "train")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("arrays", "what"),
    [(drawn(64, 64, 100), ""), (drawn() | {"classes": np.full(2**14, "a")}, "classes of ")],
    ids=["images", "classes"],
)
def test_what_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, arrays: Arrays, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**20)
    genuine = np.lib.format.read_array

    def read_small(file: object, **options: bool) -> np.ndarray:
        array = genuine(file, **options)
        assert array.nbytes < 2**16
        return array

    monkeypatch.setattr(np.lib.format, "read_array", read_small)
    path = save(tmp_path, arrays)
    with pytest.raises(
        DataError, match=rf"^reading {what}{path} takes 2 MiB of memory, and 1 MiB are free; make it sm"
    ):
        read_arrays(path, "train")


def test_any_damage_is_answered(tmp_path: Path) -> None:
    """The archive's checksums find most damage; some damage, as to a time, changes nothing."""
    path = save(tmp_path, drawn())
    content, images = path.read_bytes(), drawn()["train_images"]
    for place in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[place : place + 4] = bytes(255 - byte for byte in damaged[place : place + 4])
        path.write_bytes(damaged)
        with suppress(DataError):
            assert np.array_equal(read_arrays(path, "train").images.numpy(), images)
