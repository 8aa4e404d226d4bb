"""Images to classify, in every form: their order, and an error for what is none."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from small_run import images_like

from fastcifar.errors import DataError
from fastcifar.inference.images import open_images, read_pair


def read_all(source: object, size: int, batch: int = 4) -> np.ndarray:
    batches = list(open_images(source, size).batches(batch))
    assert all(0 < len(part) <= batch for part in batches)
    assert all(part.dtype == torch.uint8 for part in batches)
    return torch.cat(batches).numpy()


@pytest.mark.parametrize("count", [1, 4, 9])
def test_arrays(tmp_path: Path, count: int) -> None:
    """The images of a .npy file stay on the disk."""
    images = images_like(count)
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "only.npz", whatever=images)
    np.savez(tmp_path / "named.npz", images=images, labels=np.zeros(count))
    for name in ("a.npy", "only.npz", "named.npz"):
        assert np.array_equal(read_all(tmp_path / name, 8), images)
    assert isinstance(open_images(tmp_path / "a.npy", 8).items, np.memmap)


def test_pictures_in_the_order_of_their_paths(tmp_path: Path) -> None:
    images = dict(zip(["b/x.png", "a/y.png", "10.png", "2.png", "a/x.png"], images_like(5), strict=True))
    for name, image in (images | {".cache/z.png": images["2.png"]}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "note.txt").write_text("no picture")
    expected = [images[name] for name in ("10.png", "2.png", "a/x.png", "a/y.png", "b/x.png")]
    assert np.array_equal(read_all(tmp_path, 8, batch=2), expected)


def test_images_of_another_size_are_cut_and_resized_whatever_their_form(tmp_path: Path) -> None:
    """They are fitted as Pillow's own `fit` does; images of the right size stay unchanged."""
    wide, own = np.random.default_rng(0).integers(0, 256, (3, 12, 20, 3), dtype=np.uint8), images_like(2)
    np.save(tmp_path / "a.npy", wide)
    (tmp_path / "folder").mkdir()
    for number, image in enumerate((*wide, *own)):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number}.png")
    pictures = [Image.fromarray(image) for image in wide]
    expected = np.stack([ImageOps.fit(picture, (8, 8), Image.Resampling.LANCZOS) for picture in pictures])
    for source in (wide, torch.from_numpy(wide), tmp_path / "a.npy", pictures):
        images = open_images(source, 8)
        assert np.array_equal(torch.cat(list(images.batches(2))), expected)
        assert images.resized == {(20, 12): 3}
    mixed = open_images([tmp_path / "folder", str(tmp_path / "folder" / "1.png"), images_like(1, size=9)], 8)
    assert np.array_equal(torch.cat(list(mixed.batches(4)))[:6], [*expected, *own, expected[1]])
    assert mixed.resized == {(20, 12): 4, (9, 9): 1}


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("key", [b"data", "data"], ids=repr)
def test_a_cifar_batch(tmp_path: Path, key: bytes | str, labelled: bool) -> None:
    images = images_like(3, size=32)
    content = {key: images.transpose(0, 3, 1, 2).reshape(3, 3072).copy()} | ({b"labels": [1, 2, 3]} if labelled else {})
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol=4))
    assert np.array_equal(read_all(tmp_path / "batch", 32), images)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    hostile = Hostile(tmp_path / "executed")
    (tmp_path / "batch").write_bytes(pickle.dumps({b"data": hostile}))
    np.save(tmp_path / "a.npy", np.array([hostile], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", images=np.array([hostile], dtype=object))
    for name in ("batch", "a.npy", "a.npz"):
        with pytest.raises(DataError):
            open_images(tmp_path / name, 32)
    assert not hostile.marker.exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ([], "the list of images is empty"),
        (3, "images are int; give a path"),
        (Path("nowhere"), "does not exist; give a picture"),
        (Image.new("I;16", (8, 8)), "more than 8 bits a channel; convert it to RGB"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.bfloat16), r"the array: images are bfloat16 \(2, 8, 8, 3\)"),
        (images_like(1)[0], r"images are uint8 \(8, 8, 3\); expected uint8 \(N, H, W, 3\)"),
        (images_like(2, size=7).transpose(0, 3, 1, 2), r"\(N, H, W, 3\), RGB: save images.transpose\(0, 2, 3, 1\)"),
        (images_like(2)[:0], "holds no images"),
    ],
    ids=["nothing", "number", "absent", "16 bits", "dtype", "one", "planes", "empty"],
)
def test_things_that_are_no_images(source: object, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        open_images(source, 8)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.npy", b"nonsense", "cannot be read"),
        ("a.npz", b"nonsense", "damaged"),
        ("batch", b"nonsense", "is not a sound CIFAR batch"),
        ("batch", pickle.dumps({b"data": np.zeros((2, 10), np.uint8)}, 2), r"\(N, 3072\)|not a sound CIFAR batch"),
        ("folder/note.txt", b"", "holds no pictures"),
        ("folder/a.png", b"nonsense", "is no PNG"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        read_all(path if path.parent == tmp_path else path.parent, 32)
    assert "\n" not in str(caught.value)


def test_pairs(tmp_path: Path) -> None:
    images, labels = images_like(3), np.array([2, 0, 1], np.uint8)
    np.savez(tmp_path / "pair.npz", images=images, labels=labels)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    for text in (f"{tmp_path}/pair.npz", f"{tmp_path}/images.npy,{tmp_path}/labels.npy", str(tmp_path)):
        found, targets = read_pair(text, 8, 3)
        assert np.array_equal(found.numpy(), images)
        assert (targets.dtype, targets.tolist()) == (torch.int64, [2, 0, 1])


@pytest.mark.parametrize(
    ("size", "labels", "expected"),
    [
        (8, None, "is no pair"),
        (8, np.array([0, 1]), r"labels are int64 \(2,\); expected integers \(3,\)"),
        (8, np.array([0.0, 1, 2]), "labels are float64"),
        (8, np.array([0, 1, 3]), "run from 0 to 3; expected 0 to 2"),
        (7, np.arange(3), r"uint8 \(3, 7, 7, 3\); expected uint8 \(N, 8, 8, 3\), RGB, as the run was trained on"),
    ],
)
def test_pairs_that_do_not_fit(tmp_path: Path, size: int, labels: np.ndarray | None, expected: str) -> None:
    arrays = {"images": images_like(3, size)} | ({} if labels is None else {"labels": labels})
    np.savez(tmp_path / "pair.npz", **arrays)
    with pytest.raises(DataError, match=expected):
        read_pair(f"{tmp_path}/pair.npz", 8, 3)
