"""From a configuration to a trainer: the images, the validation split, and what a machine cannot do."""

from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, image_set

from fastcifar import cli
from fastcifar.config import ModelConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.engine.run import naming_failures, train
from fastcifar.engine.setup import Images, build_trainer, open_images
from fastcifar.errors import ConfigError, DataError, FastcifarError
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


@pytest.mark.parametrize(("batch_size", "micro_batch"), [(1, None), (20, 1), (20, 19)])
def test_a_batch_norm_of_single_values_is_refused(batch_size, micro_batch):
    tiny = ModelConfig("resnet", blocks=(1,) * 5, channels=(4,) * 5)
    config = replace(CONFIG, model=tiny, batch_size=batch_size)
    images = Images(image_set(40), image_set(20, 1))
    with pytest.raises(ConfigError, match=r"stage5.0.branch.1 normalises maps of one pixel"):
        build_trainer(replace(config, engine=replace(config.engine, micro_batch=micro_batch)), images=images)


def torch_runs_out() -> None:
    torch.empty(2**50)


def python_runs_out() -> None:
    bytearray(2**62)


@pytest.mark.parametrize("run_out", [torch_runs_out, python_runs_out])
def test_main_memory_that_runs_out_ends_in_a_sentence(run_out, monkeypatch, capsys):
    with (
        pytest.raises(FastcifarError, match=r"memory ran out \(.*\); close other .* or with --micro-batch"),
        naming_failures(),
    ):
        run_out()
    monkeypatch.setattr(cli, "parse", lambda arguments: run_out)
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("fastcifar: memory ran out (")


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), naming_failures():
        torch.zeros(2, 3) @ torch.zeros(2, 3)
