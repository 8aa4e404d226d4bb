"""From a configuration to a trainer: the images, and the validation split."""

from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, image_set

from fastcifar.data.image_set import ImageSet
from fastcifar.engine.run import train
from fastcifar.engine.setup import Images, build_trainer, open_images
from fastcifar.errors import ConfigError, DataError
from fastcifar.recipes.registry import derive


@pytest.mark.parametrize("changes", [{"seed": 1}, {"split_seed": 1}], ids=str)
def test_the_validation_split_is_drawn_by_its_own_seed(changes):
    """The members of an ensemble thus share a split to choose by."""
    config = replace(CONFIG, data=replace(CONFIG.data, val_split=30))
    images = Images(image_set(100), image_set(20, 1))
    first, second = (build_trainer(one, images=images).validation for one in (config, derive(config, **changes)))
    assert torch.equal(first.images, second.images) == ("seed" in changes)


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (16, 8), (8, 16), (1025, 1025)], ids=str)
def test_images_that_no_network_takes_are_refused_before_training(shape, tmp_path):
    sets = [ImageSet.of(torch.zeros(4, *shape, 3, dtype=torch.uint8), [0, 1, 0, 1]) for _ in range(2)]
    with pytest.raises(
        DataError, match=f"square images of 4 to 1024 pixels a side, and these are {shape[1]}x{shape[0]}"
    ):
        train(CONFIG, tmp_path / "run", train_set=sets[0], test_set=sets[1])
    assert not (tmp_path / "run").exists()


def test_two_sets_that_do_not_belong_together_are_refused():
    train, test = image_set(40), image_set(20, 1)
    with pytest.raises(ConfigError, match="give both or none"):
        open_images(CONFIG, train, None)
    for other in (replace(test, classes=tuple("vwxyz")), replace(test, images=test.images[:, :8, :8])):
        with pytest.raises(ConfigError, match="differ in their classes or in the size"):
            open_images(CONFIG, train, other)
