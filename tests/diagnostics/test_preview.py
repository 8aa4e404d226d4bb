from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastcifar.augment import geometry
from fastcifar.augment.automatic import Operation
from fastcifar.augment.policy import Policy, parse
from fastcifar.augment.random import Key
from fastcifar.augment.sampling import Mixing, Params, Slot, sample
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader
from fastcifar.diagnostics.preview import (
    GAP,
    PAIR_SIDE,
    SHEET_SIDE,
    describe,
    describe_warp,
    pairs,
    preview,
    sheet,
    view,
)
from fastcifar.errors import ConfigError, FastcifarError

COUNT = 40


@pytest.fixture
def dataset() -> ImageSet:
    """Random pictures, sorted by class."""
    images = torch.randint(0, 200, (COUNT, 16, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(
        images, torch.arange(COUNT) // 10, ("ant", "bee", "c$t", "dog_$x"), (0.4, 0.4, 0.4), (0.2, 0.2, 0.2)
    )


@pytest.fixture
def inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts colours inverted in the place of what training does, so that no two images of a page are alike."""

    def augmented(policy: Policy, dataset: ImageSet, key: Key, index: Tensor) -> Tensor:
        return 255 - dataset.images[index]

    monkeypatch.setattr("fastcifar.diagnostics.preview.augmented", augmented)


@pytest.mark.parametrize(
    "policy", ["transform2_reflect", "crop:4,flip,trivialaugment,cutout:2x4", "flip,mixup", "crop,cutmix"]
)
def test_pixels_are_those_of_training(dataset: ImageSet, policy: str) -> None:
    [(batch, _)] = Loader(
        dataset, policy, "torch", COUNT, seed=5, device="cpu", dtype=torch.uint8, shuffle=False
    ).batches(2)
    seen = view(policy, dataset, Key(5, 2), torch.tensor([3, 0, 39]))
    assert np.array_equal(seen.images, batch[[3, 0, 39]].permute(0, 2, 3, 1))
    assert np.array_equal(seen.originals, dataset.images[[3, 0, 39]])
    assert not np.array_equal(seen.images, seen.originals)


def read(path: Path) -> np.ndarray:
    """uint8 (H, W, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def place_of(image: Tensor, page: np.ndarray, scale: int) -> tuple[int, int]:
    """Row and column of the one place where the page shows the image, each pixel enlarged to `scale` by `scale`."""
    large = image.numpy().repeat(scale, 0).repeat(scale, 1)
    corners = np.argwhere((page == large[0, 0]).all(2))
    height, width, _ = large.shape
    [place] = [(y, x) for y, x in corners if np.array_equal(page[y : y + height, x : x + width], large)]
    return place


@pytest.mark.usefixtures("inverted")
@pytest.mark.parametrize("count", [1, 7, 12])
def test_a_page_of_pairs(dataset: ImageSet, tmp_path: Path, count: int) -> None:
    path = tmp_path / "new" / "page.png"
    assert preview(["standard"], dataset, path, count=count) == [path]
    page, scale = read(path), PAIR_SIDE // 16
    index = [number * COUNT // count for number in range(count)]
    above = [place_of(dataset.images[place], page, scale) for place in index]
    below = [place_of(255 - dataset.images[place], page, scale) for place in index]
    assert below == [(y + 16 * scale + GAP, x) for y, x in above]
    assert above == sorted(above)
    assert len({y for y, _ in above}) == (count + 5) // 6


@pytest.mark.usefixtures("inverted")
def test_a_sheet_of_policies(dataset: ImageSet, tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    assert preview(["standard", "autoaugment", "standard"], dataset, path, count=5) == [path]
    page, scale = read(path), SHEET_SIDE // 16
    row, column = place_of(dataset.images[8], page, scale)
    large = (255 - dataset.images[8].numpy()).repeat(scale, 0).repeat(scale, 1)
    shown = [y for y in range(page.shape[0] - 63) if np.array_equal(page[y : y + 64, column : column + 48], large)]
    assert len(shown) == 2
    assert shown[0] > row


def test_a_folder_gets_all(dataset: ImageSet, tmp_path: Path) -> None:
    files = preview(["standard", "crop:4,cutout:4x4", "transform2"], dataset, tmp_path / "out")
    assert [file.name for file in files] == ["all.png", "standard.png", "crop_4_cutout_4x4.png", "transform2.png"]
    assert sorted((tmp_path / "out").iterdir()) == sorted(files)
    assert preview(["none"], dataset, tmp_path / "out") == [tmp_path / "out" / "none.png"]


def test_titles_and_captions(dataset: ImageSet) -> None:
    seen = view("transform1_reflect", dataset, Key(0, 0), torch.tensor([0, 10, 30]))
    texts = [text for _, _, text, _ in pairs(seen).texts]
    assert texts == [
        "transform1_reflect",
        "crop:4,flip:0.5,rotate:15,translate:0.1,\nfill:reflect,bilinear",
        "ant",
        "bee",
        "dog_$x",
    ]
    own = view("crop:4,flip:0.5", dataset, Key(0, 0), torch.tensor([0]))
    assert [text for _, _, text, _ in sheet([seen, own]).texts if text] == [
        "original",
        "transform1_reflect",
        "crop:4,flip:0.5,rotate:15,\ntranslate:0.1,fill:reflect,\nbilinear",
        "crop:4,flip:0.5",
        "ant",
        "bee",
        "dog_$x",
    ]


def test_captions_of_mixed_images_name_both(dataset: ImageSet) -> None:
    index = torch.tensor([0, 10, 30])
    mixing = sample(parse("mixup"), Key(3, 1), index, (16, 12), COUNT).mixing
    for row, caption in enumerate(view("mixup", dataset, Key(3, 1), index).captions):
        share = int(mixing.share[row]) / 256
        partner = dataset.classes[int(mixing.partner[row]) // 10]
        assert caption == f"{('ant', 'bee', 'dog_$x')[row]} {share:.0%}\n{partner} {1 - share:.0%}"


@pytest.mark.usefixtures("inverted")
def test_large_and_tiny_images(tmp_path: Path) -> None:
    for height, width in ((200, 90), (1, 1), (3, 40)):
        images = torch.randint(0, 200, (3, height, width, 3), dtype=torch.uint8)
        dataset = ImageSet(images, torch.tensor([0, 1, 1]), ("a", "b" * 40), (0.4,) * 3, (0.2,) * 3)
        preview(["none"], dataset, tmp_path / "page.png")
        if height > 1:
            scale = max(1, PAIR_SIDE // max(height, width))
            place_of(images[2], read(tmp_path / "page.png"), scale)
        preview(["none", "crop"], dataset, tmp_path / "sheet.png")


def test_show_params(dataset: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    preview(["standard", "autoaugment"], dataset, tmp_path / "page.png", count=4, show_params=True)
    first, second = (block.splitlines() for block in capsys.readouterr().out.strip().split("\n\n"))
    assert first[0] == "standard  crop:4,flip:0.5"
    assert second[0] == "autoaugment"
    assert [line.split()[:2] for line in first[1:]] == [["0", "ant"], ["10", "bee"], ["20", "c$t"], ["30", "dog_$x"]]
    assert len(second) == 5
    preview(["standard"], dataset, tmp_path / "page.png")
    assert capsys.readouterr().out == ""


def numbers(*maps: Tensor) -> list[int]:
    matrix = maps[0]
    for other in maps[1:]:
        matrix = matrix @ other
    return geometry.fixed_point(matrix)[0].tolist()


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


MIRROR, SHIFT = geometry.mirror(torch.tensor([True]), 12), geometry.translation(one(3), one(-2))
TURN = geometry.rotation(one(20), (6, 8))
SLANT = geometry.shear(one(0.1), one(0), (6, 8))


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ((geometry.identity(1),), []),
        ((SHIFT,), ["moved 3.0 px left and 2.0 px down"]),
        ((SHIFT, MIRROR), ["mirrored", "moved 3.0 px right and 2.0 px down"]),
        ((MIRROR,), ["mirrored"]),
        ((TURN,), ["turned +20.0 degrees"]),
        ((SLANT,), ["sheared +5.7 degrees"]),
        ((MIRROR, SLANT, TURN), ["mirrored", "turned +20.0 degrees", "sheared +5.7 degrees"]),
        ((TURN, geometry.translation(one(-4), one(0))), ["turned +20.0 degrees", "moved 4.0 px right"]),
        ((geometry.rotation(one(-90), (6, 8)),), ["turned -90.0 degrees"]),
    ],
    ids=lambda value: ", ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_maps_in_words(maps: tuple[Tensor, ...], words: list[str]) -> None:
    assert describe_warp(numbers(*maps), (16, 12)) == words


def test_everything_in_words(dataset: ImageSet) -> None:
    identity = torch.tensor([numbers(geometry.identity(1))] * 2)
    slots = (
        Slot(torch.tensor([Operation.SOLARIZE, Operation.IDENTITY]), torch.tensor([127.5, 0.0]).double(), identity, 0),
        Slot(
            torch.tensor([Operation.AUTO_CONTRAST, Operation.TRANSLATE_X]),
            torch.tensor([0.0, -9.0]).double(),
            identity,
            0,
        ),
    )
    boxes = torch.tensor([[[0, 3, 4, 7], [12, 0, 12, 4]], [[5, 5, 5, 9], [5, 5, 9, 5]]])
    mixing = Mixing(torch.tensor([15, 25]), torch.tensor([128, 256]), torch.tensor([[2, 3, 10, 8], [4, 4, 4, 9]]))
    params = Params(identity, slots, torch.tensor([True, False]), boxes, mixing)
    assert [describe(params, row, (16, 12), dataset) for row in range(2)] == [
        "solarize 127.5, auto contrast, greyscale, erased 4x4 at (0, 3), 50% kept, the rest from 15 (bee): 8x5 at "
        "(2, 3)",
        "identity, translate x -9, 100% kept, the rest from 25 (c$t): nothing",
    ]
    assert describe(Params(identity, (), None, None, None), 0, (16, 12), dataset) == "unchanged"
    mixup = Params(None, (), None, None, Mixing(mixing.partner, mixing.share, None))
    assert describe(mixup, 0, (16, 12), dataset) == "50% kept, the rest from 15 (bee)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policies": []}, "there is no policy to preview; name one, such as standard"),
        ({"policies": ["standrad"]}, "unknown augmentation 'standrad'; did you mean standard"),
        ({"count": 0}, "count is 0; expected 1 to 1000"),
        ({"seed": -1}, "seed is -1"),
        ({"epoch": 2**32}, "epoch is 4294967296"),
        ({"path": Path("picture.jpg")}, r"picture\.jpg is neither a \.png file nor a folder; end it in \.png"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refuses(dataset: ImageSet, tmp_path: Path, arguments: dict, message: str) -> None:
    arguments = {"policies": ["standard"], "path": tmp_path / "page.png", **arguments}
    with pytest.raises(ConfigError, match=message):
        preview(dataset=dataset, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(dataset: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        FastcifarError, match=r"page\.png cannot be written \(.*\); make room there, .* choose another folder\.$"
    ):
        preview(["standard"], dataset, tmp_path / "file" / "page.png")
