from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcifar.augment import geometry
from fastcifar.augment.automatic import Operation
from fastcifar.augment.policy import parse
from fastcifar.augment.random import Key
from fastcifar.augment.sampling import Mixing, Params, Slot, sample
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader
from fastcifar.diagnostics.preview import describe, describe_warp, pairs_of, preview, sheet_of, view
from fastcifar.errors import ConfigError, FastcifarError

COUNT = 40


@pytest.fixture
def dataset() -> ImageSet:
    images = torch.randint(0, 200, (COUNT, 16, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(
        images, torch.arange(COUNT) // 10, ("ant", "bee", "c$t", "dog_$x"), (0.4, 0.4, 0.4), (0.2, 0.2, 0.2)
    )


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


def test_a_page_shows_originals_above_what_became_of_them(dataset: ImageSet) -> None:
    seen = view("transform1_reflect", dataset, Key(0, 0), torch.tensor([0, 10, 30]))
    images, captions, title = pairs_of(seen)
    assert np.array_equal(images, np.stack((seen.originals, seen.images)))
    assert captions == ["ant", "bee", "dog_$x"]
    assert title == "transform1_reflect\ncrop:4, flip:0.5, rotate:15, translate:0.1, fill:reflect, bilinear"


def test_a_sheet_has_a_row_for_each_policy(dataset: ImageSet) -> None:
    views = [
        view(name, dataset, Key(0, 0), torch.tensor([0, 39])) for name in ("transform1_reflect", "crop:4,flip:0.5")
    ]
    images, captions, _, labels = sheet_of(views)
    assert np.array_equal(images, np.stack((views[0].originals, views[0].images, views[1].images)))
    assert captions == ["ant", "dog_$x"]
    spelt = "transform1_reflect\ncrop:4, flip:0.5, rotate:15,\ntranslate:0.1, fill:reflect,\nbilinear"
    assert labels == ["original", spelt, "crop:4, flip:0.5"]


def test_files_are_named_after_their_policies(dataset: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Several policies in one file make a sheet; a folder gets a page for each besides."""
    one, out = tmp_path / "new" / "a.png", tmp_path / "out"
    assert preview(["none"], dataset, one) == preview(["none", "standard", "none"], dataset, one) == [one]
    files = preview(["standard", "crop:4,cutout:4x4"], dataset, out, count=2)
    assert [file.name for file in files] == ["all.png", "standard.png", "crop_4_cutout_4x4.png"]
    assert sorted(out.iterdir()) == sorted(files)
    assert capsys.readouterr().out == ""


def test_captions_of_mixed_images_name_both(dataset: ImageSet) -> None:
    index = torch.tensor([0, 10, 30])
    mixing = sample(parse("mixup"), Key(3, 1), index, (16, 12), COUNT).mixing
    for row, caption in enumerate(view("mixup", dataset, Key(3, 1), index).captions):
        share = int(mixing.share[row]) / 256
        partner = dataset.classes[int(mixing.partner[row]) // 10]
        assert caption == f"{('ant', 'bee', 'dog_$x')[row]} {share:.0%}\n{partner} {1 - share:.0%}"


def test_show_params(dataset: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    preview(["standard", "autoaugment"], dataset, tmp_path / "page.png", count=4, show_params=True)
    first, second = (block.splitlines() for block in capsys.readouterr().out.strip().split("\n\n"))
    assert first[0] == "standard  crop:4,flip:0.5"
    assert second[0] == "autoaugment"
    assert [line.split()[:2] for line in first[1:]] == [["0", "ant"], ["10", "bee"], ["20", "c$t"], ["30", "dog_$x"]]
    assert len(second) == 5


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
    params = Params(identity, slots, torch.tensor([True, False]), None, boxes, mixing)
    assert [describe(params, row, (16, 12), dataset) for row in range(2)] == [
        "solarize 127.5, auto contrast, greyscale, erased 4x4 at (0, 3), 50% kept, the rest from 15 (bee): 8x5 at "
        "(2, 3)",
        "identity, translate x -9, 100% kept, the rest from 25 (c$t): nothing",
    ]
    assert describe(Params(identity), 0, (16, 12), dataset) == "unchanged"
    brighter = Params(intensity=torch.tensor([[0.5, -0.25, 0.0]]))
    assert describe(brighter, 0, (16, 12), dataset) == "intensity +0.50 -0.25 +0.00"
    mixup = Params(mixing=Mixing(mixing.partner, mixing.share, None))
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


def test_it_is_nothing_without_its_picture(dataset: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FastcifarError, match=r"page\.png cannot be written"):
        preview(["standard"], dataset, tmp_path / "file" / "page.png", count=1)
