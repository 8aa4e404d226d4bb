"""The recipes say truly what they change, and a report's mistakes have a sensible recipe beside them."""

from dataclasses import replace

import pytest
import torch

from fastcifar import cli
from fastcifar.augment.policy import parse
from fastcifar.config import RunConfig
from fastcifar.errors import ConfigError
from fastcifar.models import build_model
from fastcifar.optim.schedules import lr_table
from fastcifar.recipes import RECIPES, recipe, select
from fastcifar.recipes.listing import description
from fastcifar.recipes.registry import derive, difference, settings


def lr_of(name: str) -> list[float]:
    config = recipe(name)
    return lr_table(config.schedule, config.optim.peak_lr(config.batch_size), 10, config.epochs)


@pytest.mark.parametrize("name", RECIPES)
def test_each_is_valid_and_differs_from_what_it_is_made_from(name):
    entry, config = RECIPES[name], recipe(name)
    assert config.recipe == name
    assert RunConfig.from_json(config.to_json()) == config
    assert entry.changes
    assert entry.parent is None or entry.parent in RECIPES
    assert entry.source.split()[0] in {"R1", "R2", "R3", "R4", "R5", "ours"}
    assert description(entry).endswith(f"fastcifar train --recipe {name}")
    if entry.measure == "average":
        assert len(config.average.decays) + (config.average.swa_start is not None) == 1


def test_no_two_are_the_same():
    texts = [replace(recipe(name), recipe=None).to_json() for name in RECIPES]
    assert len(set(texts)) == len(texts)


def test_what_was_written_is_kept_beside_what_makes_sense():
    written = {name: name.removesuffix("_as_written") for name in RECIPES if name.endswith("_as_written")}
    alone = {name for name, sense in written.items() if sense not in RECIPES}
    assert alone == {
        "r1_resnet20_swa_early_as_written",
        "r1_resnet_prop_swa_early_as_written",
        "r3_resnet_s3_step_as_written",
    }
    for name in written.keys() - alone:
        own, mended = RECIPES[name], RECIPES[written[name]]
        assert difference(own.config, mended.config), name
        assert (own.claim, own.measure) == (mended.claim, mended.measure), name


def test_reports_that_chose_by_the_test_set_watch_it():
    watching = {name for name in RECIPES if recipe(name).watch_test}
    assert watching == {
        name for name in RECIPES if name.startswith(("r1_", "r4_", "r5_")) and not recipe(name).data.val_split
    }
    assert {name for name in RECIPES if recipe(name).data.val_split} >= {
        n for n in RECIPES if "_tune_" in n or n[:2] == "r3"
    }


def test_every_network_can_be_built_and_keeps_to_its_report():
    """On no device, only shapes are made."""
    for model in {recipe(name).model for name in RECIPES}:
        with torch.device("meta"):
            network = build_model(model.arch, **model.options)
        assert sum(p.numel() for p in network.parameters()) <= (model.max_params or float("inf"))


@pytest.mark.parametrize("name", ["linear", "polynomial", "one_cycle"])
def test_report_4s_schedules_mended_go_over_the_whole_run(name):
    rates = lr_of(f"r4_scheduler_{name}")
    assert rates[-1] < 0.001
    assert rates[len(rates) // 2] > 0.01


def test_swa_by_its_authors_moves_while_it_averages():
    rates = lr_of("r1_resnet20_swa")
    assert max(rates) == pytest.approx(0.1)
    assert rates[1500:] == pytest.approx([0.01] * 500)
    assert lr_of("r1_resnet20_swa_as_written")[-1] < 1e-5


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_larger_batches_get_larger_rates(size):
    assert max(lr_of(f"r1_resnet_prop_batch{size}")) == pytest.approx(0.1 * size / 128)
    assert max(lr_of(f"r1_resnet_prop_batch{size}_as_written")) == pytest.approx(0.1)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("_reflect")])
def test_reflected_transforms_change_fill_and_interpolation_alone(name):
    black, reflected = parse(recipe(name.removesuffix("_reflect")).data.augment), parse(recipe(name).data.augment)
    assert reflected == replace(black, fill="reflect", interpolation="bilinear")


def test_derive_finds_each_setting_by_its_flag():
    changes = {"augment": "none", "lr": 0.5, "schedule": "constant", "loss": "asymmetric", "epochs": 3}
    assert difference(derive(RunConfig(), **changes), RunConfig()) == changes
    assert derive(derive(RunConfig(), **changes), **settings(RunConfig())) == RunConfig()
    with pytest.raises(ConfigError, match="unknown setting 'momentom'; did you mean momentum"):
        derive(RunConfig(), momentom=0.9)
    with pytest.raises(ConfigError, match="adam does not read momentum"):
        derive(RunConfig(), optimizer="adam", momentum=0.9)


def test_names_of_settings_are_unambiguous():
    """The functions derive and difference and the flags rely on it; `schedule` and `loss` also name their parts."""
    config = RunConfig()
    parts = (config.model, config.data, config.optim, config.schedule, config.loss, config.average, config.engine)
    own = ("epochs", "batch_size", "seed", "watch_test", "recipe")
    assert len(settings(config)) == sum(len(settings(part)) for part in parts) + len(own)


def test_select():
    assert [entry.name for entry in select(["r1_resnet20_transform?", "r1_resnet20_transform1"])] == [
        "r1_resnet20_transform1",
        "r1_resnet20_transform2",
    ]
    with pytest.raises(ConfigError, match=r"did you mean .*r1_resnet20_standard"):
        select(["r1_resnet20_standart"])
    with pytest.raises(ConfigError, match="no recipe was named"):
        select([])


def test_the_list_has_every_recipe_and_its_changes(capsys):
    assert cli.main(["recipes"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == ["recipe", *RECIPES]
    assert lines["r1_resnet20_transform1"][1:] == "R1 T5 88.19 r1_resnet20_standard: augment=transform1".split()
    assert lines["r5_ensemble_member"][3:5] == ["97.68", "(ensemble)"]


def test_a_recipe_is_described_by_all_that_is_not_default(capsys):
    assert cli.main(["recipes", "r4_final"]) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, value in [("dropout", "0.4"), ("normalize", "none"), ("watch_test", "True"), ("claim", "96.10")]:
        assert [name, value] in words
    assert ["made", "of", "r4_baseline:", "pool=default", "dropout=0.4", "normalize=none"] in words


@pytest.mark.parametrize(("name", "rule"), [("r4_final", "PyTorch's own"), ("r5_wrn28_2_sam", "by He's rule")])
def test_the_description_says_how_the_weights_begin(name, rule):
    assert f"initial weights  {rule}" in description(RECIPES[name])
