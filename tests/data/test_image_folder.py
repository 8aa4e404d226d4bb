from __future__ import annotations

import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcifar.data import image_folder, memory
from fastcifar.data.sources import load_dataset
from fastcifar.errors import DataError


def picture(seed: int, height: int = 32, width: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def write(folder: Path, pictures: dict[str, Image.Image | bytes]) -> Path:
    for name, content in pictures.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path)
    return folder


NAMES = [
    "train/bee/2.png",
    "train/bee/1.png",
    "train/ant/b.BMP",
    "train/ant/a.png",
    "train/ant/c.webp",
    "test/ant/x.jpeg",
    "test/bee/y.jpg",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "own", {name: picture(seed) for seed, name in enumerate(NAMES)})


def cached(isolated: Path) -> list[Path]:
    return sorted(path for path in isolated.iterdir() if path.suffix != ".lock") if isolated.exists() else []


def test_pictures_in_order(folder: Path) -> None:
    train, test = load_dataset(str(folder)), load_dataset(str(folder), "test")
    assert train.classes == test.classes == ("ant", "bee")
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert test.labels.tolist() == [0, 1]
    assert test.images.shape == (2, 32, 32, 3)
    assert (train.mean, train.std) == (test.mean, test.std)
    for row, seed in {0: 3, 1: 2, 3: 1, 4: 0}.items():
        assert np.array_equal(train.images[row], np.asarray(picture(seed)))


@pytest.mark.parametrize("size", [8, 33])
def test_any_size_becomes_the_asked_one(tmp_path: Path, size: int) -> None:
    sizes = [(20, 50), (50, 20), (64, 64), (5, 7), (1, 1)]
    pictures = {f"train/ant/{height}.png": picture(0, height, width) for height, width in sizes}
    folder = write(tmp_path / "own", pictures | {"test/ant/c.png": picture(1)})
    assert load_dataset(f"{folder}@{size}").images.shape == (5, size, size, 3)


def test_the_middle_is_kept_and_smoothed(tmp_path: Path) -> None:
    """The picture has a red bar left, a blue one right and a fine chequerboard between, which becomes grey."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :32, 0], pixels[:, 96:, 2] = 255, 255
    pixels[:, 32:96] = 255 * (np.indices((64, 64)).sum(0) % 2)[..., None]
    image = image_folder.decode(write(tmp_path, {"wide.png": Image.fromarray(pixels)}) / "wide.png", 16)
    assert np.abs(image.astype(int) - 128).max() <= 12


def test_exif_orientation_is_respected(tmp_path: Path) -> None:
    pixels = np.full((32, 32, 3), 250, np.uint8)
    pixels[:16] = 10
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = image_folder.decode(tmp_path / "turned.jpg", 32)
    assert image[:14].min() > 200
    assert image[-14:].max() < 60


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_colours_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture(0).convert(mode).save(path)
    with Image.open(path) as image:
        assert np.array_equal(image_folder.decode(path, 32), np.asarray(image.convert("RGB")))


def test_the_cache_is_read_in_place_of_the_pictures_unless_it_is_damaged(
    folder: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    first = load_dataset(str(folder))
    [cache] = cached(isolated)
    assert capsys.readouterr().err == f"decoding {folder} at 32x32 pixels into {cache}\n"
    assert cache.suffix == ".npz"
    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "decode", lambda path, size: pytest.fail(f"decoded {path}"))
        assert first.images.equal(load_dataset(str(folder)).images)
        assert len(load_dataset(f"{folder}@32", "test")) == 2
    assert capsys.readouterr().err == ""
    assert np.array_equal(load_dataset(str(cache)).images, first.images)
    cache.write_bytes(cache.read_bytes()[:-100])
    assert first.images.equal(load_dataset(str(folder)).images)


CHANGES = {
    "another size": lambda folder: None,
    "a time": lambda folder: os.utime(folder / "train/ant/a.png", ns=(0, 10**9 + 1)),
    "a picture": lambda folder: picture(99).save(folder / "train/ant/new.png"),
    "a name": lambda folder: (folder / "test/bee/y.jpg").rename(folder / "test/bee/z.jpg"),
    "a length": lambda folder: (folder / "test/bee/y.jpg").write_bytes(
        (folder / "test/bee/y.jpg").read_bytes() + b"\0"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_another_cache(folder: Path, isolated: Path, change: str) -> None:
    load_dataset(str(folder))
    CHANGES[change](folder)
    load_dataset(f"{folder}@16" if change == "another size" else str(folder))
    assert len(cached(isolated)) == 2


def test_other_files_and_the_place_of_the_folder_change_nothing(folder: Path, isolated: Path) -> None:
    load_dataset(str(folder))
    others = ["readme.txt", "train/notes.txt", "train/ant/Thumbs.db", "train/ant/._a.png", "train/.old/a.png"]
    write(folder, dict.fromkeys(others, b"a"))
    (folder.parent / "elsewhere").mkdir()
    assert len(load_dataset(str(folder.rename(folder.parent / "elsewhere" / "own")))) == 5
    assert len(cached(isolated)) == 1


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full disk", "interrupt"]
)
def test_the_cache_appears_whole_or_not_at_all(
    folder: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail_half_way(file: object, **arrays: np.ndarray) -> None:
        file.write(b"half")
        raise failure

    monkeypatch.setattr(np, "savez", fail_half_way)
    message = r"cannot be written \(No space left on device\); make room there, or set XDG_CACHE_HOME"
    is_full = isinstance(failure, OSError)
    with pytest.raises(DataError if is_full else KeyboardInterrupt, match=message if is_full else None):
        load_dataset(str(folder))
    assert cached(isolated) == []


def test_what_a_killed_process_left_is_swept_away(folder: Path, isolated: Path) -> None:
    isolated.mkdir(parents=True)
    others = [isolated / name for name in (".cifar-10-python.tar.gz.partial", "own-32-0000.npz", ".other")]
    for path in (isolated / ".own-32-0123.npz.partial", *others):
        path.touch()
    load_dataset(str(folder))
    assert len(cached(isolated)) == len(others) + 1
    assert not (isolated / ".own-32-0123.npz.partial").exists()


def test_processes_take_turns(folder: Path, isolated: Path, capsys: pytest.CaptureFixture) -> None:
    with ThreadPoolExecutor() as pool:
        assert list(map(len, pool.map(load_dataset, [str(folder)] * 4))) == [5] * 4
    assert capsys.readouterr().err.count("decoding") == 1


def encoded(place: Path, image: Image.Image, suffix: str) -> bytes:
    image.save(path := place / f"encoded{suffix}")
    return path.read_bytes()


DAMAGE = {
    "text": (lambda place: b"hello", "is no PNG, JPEG, WEBP, BMP picture"),
    "postscript": (
        lambda place: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n",
        "is no PNG, JPEG, WEBP, BMP picture",
    ),
    "another format": (lambda place: encoded(place, picture(0), ".gif"), "is no PNG, JPEG, WEBP, BMP picture"),
    "truncated jpeg": (lambda place: encoded(place, picture(0), ".jpg")[:700], r"cannot be decoded \(.*truncated"),
    "16 bits": (
        lambda place: encoded(place, Image.fromarray(np.full((32, 32), 40_000, np.uint16)), ".png"),
        r"cannot be decoded \(more than 8 bits a channel\)",
    ),
}


@pytest.mark.parametrize(("content", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_picture_is_named(
    folder: Path, tmp_path: Path, isolated: Path, content: object, message: str
) -> None:
    write(folder, {"train/bee/bad.png": content(tmp_path)})
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(str(folder))
    assert str(caught.value).startswith(str(folder / "train/bee/bad.png"))
    assert re.search(r"[^.]; replace it or remove it\.$", str(caught.value))
    assert cached(isolated) == []


@pytest.mark.parametrize("most", [500, 1000], ids=["Pillow refuses", "Pillow warns"])
def test_a_bomb_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    with pytest.raises(DataError, match=r"a\.png cannot be decoded \(.*decompression bomb"):
        load_dataset(str(folder))


def test_large_pictures_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the three pictures fit into the memory at a time, and none of them into less than one takes."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 50_000)
    pictures = {f"train/ant/{seed}.png": picture(seed) for seed in range(12)}
    folder = write(tmp_path / "own", pictures | {"test/ant/0.png": picture(0)})
    together, genuine = [], image_folder.upright

    def upright(given: Image.Image) -> Image.Image:
        together.append(image_folder.DECODING.taken)
        time.sleep(0.01)
        return genuine(given)

    monkeypatch.setattr(image_folder, "upright", upright)
    assert len(load_dataset(f"{folder}@8")) == 12
    assert max(together) == 2 * 20 * 32 * 32
    assert image_folder.DECODING.taken == 0
    write(folder, {"train/ant/large.png": picture(0, 64, 64)})
    with pytest.raises(DataError, match=r"^decoding .*large\.png takes 0 MiB of memory, and 0 MiB are free"):
        load_dataset(f"{folder}@8")


def test_more_pictures_than_fit_are_refused_before_they_are_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**20)
    monkeypatch.setattr(image_folder, "decode", lambda path, size: pytest.fail(f"decoded {path}"))
    with pytest.raises(DataError, match=r"^decoding 7 pictures at 512x512 pixels takes 5 MiB of memory, and 1 MiB are"):
        load_dataset(f"{folder}@512")


def test_a_picture_that_is_no_file(folder: Path) -> None:
    (folder / "train/ant/a.png").unlink()
    os.mkfifo(folder / "train/ant/a.png")
    with pytest.raises(DataError, match=r"a\.png is no file; replace it or remove it\.$"):
        load_dataset(str(folder))


@pytest.mark.parametrize("name", [b"\x1b[31mred", b"\xff", b"a\nb", b" ", b"a" * 201], ids=repr)
def test_a_class_whose_name_cannot_be_shown(folder: Path, name: bytes) -> None:
    for split in ("train", "test"):
        (folder / split / "ant").rename(folder / split / os.fsdecode(name))
    with pytest.raises(
        DataError, match=r"^a class is called '.*'; give it a name of 1 to 200 characters that can be p"
    ) as caught:
        load_dataset(str(folder))
    assert str(caught.value).isprintable()


def test_names_outside_ascii(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split / "ant").rename(folder / split / "蚂蚁 🐜")
    assert load_dataset(str(folder)).classes == load_dataset(str(folder)).classes == ("bee", "蚂蚁 🐜")


WRONG_CLASSES = {
    "train alone": (["train/cow/z.png"], r"train/cow is a class that .*test lacks; give both splits the same classes"),
    "test alone": (["test/cow/z.png"], r"test/cow is a class that .*train lacks; give both splits the same classes"),
    "empty": (
        ["train/cow/a.tiff", "test/cow/b.tiff"],
        r"train/cow holds no pictures; put some there \(\.png, \.jpg, \.",
    ),
}


@pytest.mark.parametrize(("names", "message"), WRONG_CLASSES.values(), ids=WRONG_CLASSES.keys())
def test_classes_that_differ_or_are_empty(folder: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(str(write(folder, dict.fromkeys(names, b""))))


def test_a_split_without_classes_or_none_at_all(folder: Path) -> None:
    shutil.rmtree(folder / "test")
    with pytest.raises(DataError, match=r"test cannot be read \(No such file or directory\); expected test/CLASS/\*\."):
        load_dataset(str(folder))
    (folder / "test").mkdir()
    with pytest.raises(DataError, match=r"test holds no classes; expected a folder of pictures for each, test/CLASS/"):
        load_dataset(str(folder))
