from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cifar import UNREACHABLE, Tiny
from fake_server import Server

from fastcifar.data import cifar, sources
from fastcifar.data.sources import find, is_known, load_dataset, resolve_auto
from fastcifar.errors import DataError


@pytest.fixture(autouse=True)
def tiny_cifar10(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> Tiny:
    """Puts the tiny data set in the place of CIFAR-10, with an official address that is out of reach."""
    monkeypatch.setattr(cifar, "CIFAR10", tiny.form)
    return tiny


@pytest.fixture
def mirror(server: Server, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Server:
    server.content = tiny.packed()
    monkeypatch.setenv("FASTCIFAR_MIRRORS", f"http://127.0.0.1:{server.port}/good/")
    return server


def test_names_need_no_torch() -> None:
    code = (
        "import sys, fastcifar.data.sources as s; print(*s.DATASETS); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["cifar10", "cifar100", "synthetic"]


@pytest.mark.parametrize("function", [load_dataset, find])
def test_unknown_name(function: object) -> None:
    with pytest.raises(DataError, match=r"^unknown dataset 'cifar11'; did you mean cifar1.*, or a path such as .*\?$"):
        function("cifar11")
    with pytest.raises(DataError, match=r"^unknown dataset 'zzz'; choose one of .*, or a path such as \./set\.npz or "):
        function("zzz")


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    known = ["cifar10", "synthetic", "here", "./gone", "a/b", "own.npz", "own@32", "~/own", "a/" + 300 * "b"]
    assert [name for name in known if not is_known(name)] == []
    assert [name for name in ("cifar11", "", "own", "auto", "x" * 300, "a\0b") if is_known(name)] == []


def test_a_name_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synthetic").mkdir()
    assert len(load_dataset("synthetic", "test")) == 2_000
    with pytest.raises(DataError, match=r"synthetic holds neither train_images\.npy nor train/CLASS/\*\.png; give a"):
        load_dataset("./synthetic")
    assert find("synthetic") is None


def write_arrays(path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)
    np.savez(path, train_images=images, train_labels=[0, 1, 0, 1], test_images=images, test_labels=[1, 1, 0, 0])
    return path


def test_paths_to_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_arrays(tmp_path / "own.npz").parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("own.npz", "./own.npz", "~/own.npz", str(tmp_path / "own.npz")):
        assert load_dataset(name, "test").labels.tolist() == [1, 1, 0, 0]
    assert find("own.npz") == Path("own.npz")
    assert find("other.npz") is None


def test_an_at_that_belongs_to_the_path(tmp_path: Path) -> None:
    (tmp_path / "me@32").mkdir()
    assert len(load_dataset(str(write_arrays(tmp_path / "me@32" / "own.npz")))) == 4
    assert len(load_dataset(str(write_arrays(tmp_path / "own@64.npz")))) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.npz", r"^gone\.npz does not exist; give a \.npz file, a folder of \.npy files, or one of pictures in"),
        ("gone@32", r"^gone does not exist; give"),
        ("a/" + 300 * "b", "does not exist; give"),
        ("~nobody-here/own.npz", r"^~nobody-here/own\.npz does not exist; give"),
        ("a/\0.npz", "does not exist; give"),
        ("own.npz@32", r"own\.npz holds arrays, and @32 resizes pictures; leave it out\.$"),
        ("readme.txt", r"readme\.txt is no \.npz file, or a damaged one; write it anew with numpy\.savez\.$"),
        (".", "holds neither"),
        ("pictures@", r"^pictures@ has no size after its @; give 4 to 1024 pixels, as in pictures@32\.$"),
        ("pictures@2000", "has no size after its @"),
        ("pictures@" + 5000 * "9", "has no size after its @"),
    ],
    ids=lambda text: text[:20],
)
def test_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(write_arrays(tmp_path / "own.npz").parent)
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(DataError, match=message):
        load_dataset(name)


@pytest.mark.parametrize("name", ["cifar10", "synthetic", "./own"])
def test_unknown_split_costs_no_download(name: str, mirror: Server) -> None:
    with pytest.raises(DataError, match="unknown split 'tset'; did you mean test"):
        load_dataset(name, "tset")
    assert mirror.asked == []


def test_search_order(tiny: Tiny, tmp_path: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    monkeypatch.setenv("FASTCIFAR_DATA", str(second))
    for folder in (isolated, second, first):
        for make in (tiny.archive, tiny.folder):
            there = make(folder)
            assert find("cifar10", first) == there
            assert torch.equal(load_dataset("cifar10", data_dir=first).images, torch.from_numpy(tiny.images))
    assert find("cifar10", there) == there


def test_an_unfinished_folder_is_not_the_data_set(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path)
    (folder / "test_batch").unlink()
    for data_dir in (tmp_path, folder):
        assert find("cifar10", data_dir) is None
        with pytest.raises(
            DataError, match=rf"^{folder} lacks test_batch; put what is missing there, or use --dataset synthetic\.$"
        ):
            load_dataset("cifar10", "train", data_dir, download=False)
    assert find("cifar10", tiny.archive(tmp_path).parent) == tmp_path / tiny.form.archive


def test_a_mistyped_environment_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCIFAR_DATA", str(tmp_path / "typo"))
    with pytest.raises(
        DataError, match=r"FASTCIFAR_DATA names .*typo, which is no folder; make it, correct it, or unset it\."
    ):
        load_dataset("cifar10")


def test_without_download_the_folders_are_named(tmp_path: Path, isolated: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10", data_dir=tmp_path, download=False)
    assert f"in {tmp_path} or {isolated}; put what is missing there, or use --dataset synthetic." in str(caught.value)


def test_downloads_into_the_cache(mirror: Server, isolated: Path, tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    assert len(load_dataset("cifar10")) == 40
    assert (isolated / tiny.form.archive).is_file()
    captured = capsys.readouterr()
    expected = f"no {tiny.form.folder} or {tiny.form.archive} in {isolated}; fetching {isolated / tiny.form.archive}\n"
    assert captured.err == expected
    assert captured.out == ""
    assert len(load_dataset("cifar10", "test")) == 10
    assert mirror.asked == ["good"]


def test_data_dir_has_to_exist_and_is_only_searched(mirror: Server, isolated: Path, tiny: Tiny, tmp_path: Path) -> None:
    """A configuration from a stranger may name any folder; none is made for it, nor written into."""
    there = tmp_path / "here"
    for function in (load_dataset, lambda name, data_dir: resolve_auto(data_dir)):
        with pytest.raises(DataError, match=rf"data_dir {there} is no folder; correct it, or make one with: mkdir -p "):
            function("cifar10", data_dir=there)
    assert not there.exists()
    there.mkdir()
    load_dataset("cifar10", data_dir=str(there))
    assert not list(there.iterdir())
    assert (isolated / tiny.form.archive).is_file()


@pytest.mark.parametrize("separator", [", ", "\n"], ids=repr)
def test_mirrors_follow_the_official_address(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, separator: str) -> None:
    given = ["https://a.example/data", "https://b.example/", f"https://c.example/x/{tiny.form.archive}"]
    monkeypatch.setenv("FASTCIFAR_MIRRORS", separator.join(given))
    name = tiny.form.archive
    expected = [f"{UNREACHABLE}{name}", f"https://a.example/data/{name}", f"https://b.example/{name}", given[2]]
    assert sources.addresses(tiny.form) == expected


def test_auto_takes_what_is_at_hand_or_fetches(mirror: Server, tiny: Tiny, isolated: Path, tmp_path: Path) -> None:
    assert resolve_auto() == ("cifar10", f"CIFAR-10, fetched to {isolated / tiny.form.archive}")
    folder = tiny.folder(tmp_path)
    assert resolve_auto(tmp_path) == ("cifar10", f"CIFAR-10, found at {folder}")


@pytest.mark.parametrize("habit", ["absent", "slow"])
def test_auto_draws_otherwise(server: Server, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, habit: str) -> None:
    server.content = tiny.packed()
    monkeypatch.setattr(sources, "QUICK_DOWNLOAD", 0.5)
    monkeypatch.setenv("FASTCIFAR_MIRRORS", f"http://127.0.0.1:{server.port}/{habit}/")
    name, reason = resolve_auto()
    assert name == "synthetic"
    assert {"absent": "Not Found", "slow": "too slow, "}[habit] in reason
    assert reason.startswith("drawn shapes in place of CIFAR-10: ")
    assert "\n" not in reason
