"""From a configuration to a trainer: the images, and the validation split."""

from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, image_set

from fastcifar.engine.setup import Images, build_trainer, open_images
from fastcifar.errors import ConfigError
from fastcifar.recipes.registry import derive


@pytest.mark.parametrize("changes", [{"seed": 1}, {"split_seed": 1}], ids=str)
def test_the_validation_split_is_drawn_by_its_own_seed(changes):
    """The members of an ensemble thus share a split to choose by."""
    config = replace(CONFIG, data=replace(CONFIG.data, val_split=30))
    images = Images(image_set(100), image_set(20, 1))
    first, second = (build_trainer(one, images=images).validation for one in (config, derive(config, **changes)))
    assert torch.equal(first.images, second.images) == ("seed" in changes)


def test_two_sets_that_do_not_belong_together_are_refused():
    train, test = image_set(40), image_set(20, 1)
    with pytest.raises(ConfigError, match="give both or none"):
        open_images(CONFIG, train, None)
    for other in (replace(test, classes=tuple("vwxyz")), replace(test, images=test.images[:, :8, :8])):
        with pytest.raises(ConfigError, match="differ in their classes or in the size"):
            open_images(CONFIG, train, other)
