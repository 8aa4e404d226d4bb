"""The recipes: every reported row is there with its claim, and each says truly what it changes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastcifar import cli
from fastcifar.augment.policy import parse
from fastcifar.config import ModelConfig, OptimConfig, RunConfig
from fastcifar.errors import ConfigError
from fastcifar.models import build_model
from fastcifar.optim.schedules import lr_table
from fastcifar.recipes import RECIPES, recipe, select
from fastcifar.recipes.listing import description, overview
from fastcifar.recipes.registry import declare, derive, difference, settings

REPORTED = {
    "r1_resnet20_standard": 91.23,
    "r1_resnet20_transform1": 88.19,
    "r1_resnet20_transform2": 88.17,
    "r1_resnet20_swa": 91.23,
    "r1_resnet_prop_standard": 95.15,
    "r1_resnet_prop_transform1": 94.64,
    "r1_resnet_prop_transform2": 93.02,
    "r1_resnet_prop_swa": 94.64,
    "r1_resnet_prop_transform3": 94.89,
    "r2_stem32": 87.23,
    "r2_stem128": 89.07,
    "r2_150_epochs": 91.12,
    "r2_200_epochs": 91.19,
    "r3_resnet_s3": 93.75,
    "r4_baseline": 95.48,
    "r4_final": 96.10,
    "r4_scheduler_linear": 91.05,
    "r4_scheduler_polynomial": 78.41,
    "r4_scheduler_one_cycle": 91.29,
    "r4_augment_none": 90.71,
    "r4_augment_crop": 94.02,
    "r4_augment_flip": 93.39,
    "r4_augment_norm049": 89.36,
    "r4_augment_norm05": 89.15,
    "r4_augment_crop_flip": 95.55,
    "r4_augment_crop_norm": 94.07,
    "r4_augment_flip_norm": 93.51,
    "r4_augment_all": 95.3,
    "r4_optimizer_adam": 68.55,
    "r4_optimizer_rmsprop": 74.85,
    "r4_optimizer_adamw": 93.06,
    "r4_optimizer_adagrad": 89.88,
    "r4_optimizer_adadelta": 94.3,
    "r4_epochs_100": 85.45,
    "r4_epochs_300": 95.32,
    "r4_epochs_400": 95.31,
    "r4_pool_8x1": 95.57,
    "r4_pool_adaptive": 95.61,
    "r4_dropout_02": 95.37,
    "r4_dropout_03": 95.29,
    "r4_dropout_04": 95.49,
    "r4_dropout_05": 95.43,
    "r4_shape_4_4_3_3": 94.87,
    "r4_shape_4_4_4_4_3": 93.41,
    "r4_shape_13_13_13": 95.39,
    "r5_resnet18_asam": 97.41,
    "r5_ensemble_member": 97.68,
    "r5_resnet20_sgd": 93.18,
    "r5_resnet20_sam": 93.56,
    "r5_resnet20_asam": 93.82,
    "r5_resnet56_sgd": 94.58,
    "r5_resnet56_sam": 95.18,
    "r5_resnet56_asam": 95.42,
    "r5_wrn28_10_sgd": 96.34,
    "r5_wrn28_10_sam": 96.98,
    "r5_wrn28_10_asam": 97.28,
}
"""In percent, as the reports print them; the cells of report 4 that repeat its baseline (95.48) are that recipe."""

MISTAKEN = [
    "r1_resnet20_swa",
    "r1_resnet_prop_swa",
    "r2_stem32",
    "r3_resnet_s3",
    "r4_scheduler_linear",
    "r4_scheduler_polynomial",
    "r4_scheduler_one_cycle",
    "r4_optimizer_adam",
    "r4_optimizer_rmsprop",
    "r4_optimizer_adamw",
    "r4_optimizer_adagrad",
    "r4_optimizer_adadelta",
    "r4_epochs_100",
    "r5_resnet18_asam",
    "r5_ensemble_member",
    *(f"r1_resnet_prop_batch{size}" for size in (256, 512, 1024)),
]


def lr_of(name: str) -> list[float]:
    """The learning rates of a recipe's run at ten steps an epoch."""
    config = recipe(name)
    return lr_table(config.schedule, config.optim.peak_lr(config.batch_size), 10, config.epochs)


@pytest.mark.parametrize(("name", "percent"), REPORTED.items())
def test_every_reported_row_has_a_recipe_with_its_claim(name, percent):
    assert RECIPES[name].claim == pytest.approx(percent / 100, abs=1e-9)


def test_no_other_recipe_of_a_report_makes_a_claim_of_its_own():
    for name, entry in RECIPES.items():
        base = name.removesuffix("_as_written").removesuffix("_step")
        if entry.source != "ours" and entry.claim is not None and base not in REPORTED:
            assert (name, entry.claim) in {("r2_resnetrs50_cifar", 0.9119), ("r3_resnet_s3_sgd", 0.9375)}


@pytest.mark.parametrize("name", RECIPES)
def test_each_is_valid_and_differs_from_what_it_is_made_from(name):
    entry, config = RECIPES[name], recipe(name)
    assert config.recipe == name
    assert RunConfig.from_json(config.to_json()) == config
    assert entry.changes
    assert entry.parent is None or entry.parent in RECIPES
    assert entry.source.split()[0] in {"R1", "R2", "R3", "R4", "R5", "ours"}


def test_no_two_are_the_same():
    texts = [replace(recipe(name), recipe=None).to_json() for name in RECIPES]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", MISTAKEN)
def test_what_was_written_is_kept_beside_what_makes_sense(name):
    written, mended = RECIPES[f"{name}_as_written"], RECIPES[name]
    assert difference(written.config, mended.config)
    assert (written.claim, written.measure) == (mended.claim, mended.measure)


def test_claims_of_an_average_are_of_the_only_one():
    for name, entry in RECIPES.items():
        average = recipe(name).average
        if entry.measure == "average":
            assert len(average.decays) + (average.swa_start is not None) == 1, name


def test_reports_that_chose_by_the_test_set_watch_it():
    watching = {name for name in RECIPES if recipe(name).watch_test}
    assert watching == {name for name in RECIPES if name.startswith(("r1_", "r4_", "r5_"))}


def test_every_network_can_be_built():
    """On no device, so that only shapes are made; the counts are those of the reports, or of their closed formulas."""
    counts = {
        "r1_resnet20_standard": 272_154,
        "r1_resnet_prop_standard": 11_171_146,
        "r2_stem32": 26_115_738,
        "r3_resnet_s3": 4_935_242,
        "r4_final": 4_697_162,
        "r4_pool_8x1": 4_697_162,
        "r4_shape_4_4_3_3": 4_458_794,
        "r4_shape_4_4_4_4_3": 4_768_410,
        "r4_shape_13_13_13": 4_964_266,
        "r5_resnet18_asam": 11_173_962,
        "r5_wrn28_10_asam": 36_479_194,
    }
    networks = {recipe(name).model: name for name in RECIPES}
    networks |= {recipe(name).model: name for name in counts}
    with torch.device("meta"):
        built = {
            name: sum(p.numel() for p in build_model(model.arch, **model.options).parameters())
            for model, name in networks.items()
        }
    assert {name: built[networks[recipe(name).model]] for name in counts} == counts
    assert all(built[name] <= (model.max_params or float("inf")) for model, name in networks.items())


def test_report_4s_schedules_as_written():
    """Where its LinearLR, PolynomialLR and OneCycleLR stood after five epochs and at the end, and its cosine after
    half of it.
    """
    linear, polynomial = lr_of("r4_scheduler_linear_as_written"), lr_of("r4_scheduler_polynomial_as_written")
    assert linear[0] == pytest.approx(0.1 / 3)
    assert set(linear[50:]) == {0.1}
    assert polynomial[0] == pytest.approx(0.1)
    assert set(polynomial[50:]) == {0.0}
    one_cycle = lr_of("r4_scheduler_one_cycle_as_written")
    assert one_cycle[0] == pytest.approx(0.004)
    assert max(one_cycle) < 0.005
    cosine = lr_of("r4_epochs_100_as_written")
    assert len(cosine) == 1000
    assert cosine[-1] == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize("name", ["linear", "polynomial", "one_cycle"])
def test_report_4s_schedules_mended_go_over_the_whole_run(name):
    rates = lr_of(f"r4_scheduler_{name}")
    assert rates[-1] < 0.001
    assert rates[len(rates) // 2] > 0.01


def test_swa_by_its_authors_moves_while_it_averages():
    for name in ("r1_resnet20_swa", "r1_resnet_prop_swa"):
        rates = lr_of(name)
        assert max(rates) == pytest.approx(0.1)
        assert rates[1500:] == pytest.approx([0.01] * 500)
        assert lr_of(f"{name}_as_written")[-1] < 1e-5


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_larger_batches_get_larger_rates(size):
    assert max(lr_of(f"r1_resnet_prop_batch{size}")) == pytest.approx(0.1 * size / 128)
    assert max(lr_of(f"r1_resnet_prop_batch{size}_as_written")) == pytest.approx(0.1)


def test_reflected_transforms_change_fill_and_interpolation_alone():
    for name in (
        "r1_resnet20_transform1",
        "r1_resnet20_transform2",
        "r1_resnet_prop_transform1",
        "r1_resnet_prop_transform2",
    ):
        black, reflected = parse(recipe(name).data.augment), parse(recipe(f"{name}_reflect").data.augment)
        assert reflected == replace(black, fill="reflect", interpolation="bilinear")


def test_derive_finds_each_setting_by_its_flag():
    changed = derive(RunConfig(), augment="none", lr=0.5, epochs=3, schedule="constant", loss="asymmetric")
    assert difference(changed, RunConfig()) == {
        "augment": "none",
        "lr": 0.5,
        "schedule": "constant",
        "loss": "asymmetric",
        "epochs": 3,
    }
    assert (
        difference(derive(changed, **{name: settings(RunConfig())[name] for name in settings(changed)}), RunConfig())
        == {}
    )
    with pytest.raises(ConfigError, match="unknown setting 'momentom'; did you mean momentum"):
        derive(RunConfig(), momentom=0.9)
    with pytest.raises(ConfigError, match="adam does not read momentum"):
        derive(RunConfig(), optimizer="adam", momentum=0.9)


def test_names_of_settings_are_unambiguous():
    """As derive, difference and the flags need; `schedule` and `loss` are also the names of their parts."""
    config = RunConfig()
    parts = (config.model, config.data, config.optim, config.schedule, config.loss, config.average, config.engine)
    assert len(settings(config)) == sum(len(settings(part)) for part in parts) + len(
        ("epochs", "batch_size", "seed", "watch_test", "recipe")
    )


def test_declaring_twice_is_an_error():
    with pytest.raises(ValueError, match="quickstart is declared twice"):
        declare("ours")(recipe_named("quickstart"))


def recipe_named(name: str):
    def function() -> RunConfig:
        return RunConfig(ModelConfig("resnet18"), optim=OptimConfig("sgd"))

    function.__name__ = name
    return function


def test_select():
    assert [entry.name for entry in select(["r1_resnet20_transform?", "r1_resnet20_transform1"])] == [
        "r1_resnet20_transform1",
        "r1_resnet20_transform2",
    ]
    assert {entry.source.split()[0] for entry in select(["r4_*"])} == {"R4"}
    with pytest.raises(ConfigError, match=r"did you mean .*r1_resnet20_standard"):
        select(["r1_resnet20_standart"])
    with pytest.raises(ConfigError, match="no recipe was named"):
        select([])


def test_the_list_has_every_recipe_and_its_changes(capsys):
    assert cli.main(["recipes"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == ["recipe", *RECIPES]
    assert (
        lines["r1_resnet20_transform1"].split()
        == "r1_resnet20_transform1 R1 T5 88.19 r1_resnet20_standard: augment=transform1".split()
    )
    assert lines["r5_ensemble_member"].split()[3:5] == ["97.68", "(ensemble)"]
    assert overview().splitlines()[0] == lines["recipe"]


def test_a_recipe_is_described_by_all_that_is_not_default(capsys):
    assert cli.main(["recipes", "r4_final"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == description(RECIPES["r4_final"])
    words = [line.split() for line in printed.splitlines()]
    for name, value in [("dropout", "0.4"), ("normalize", "none"), ("watch_test", "True"), ("claim", "96.10")]:
        assert [name, value] in words
    assert ["made", "of", "r4_baseline:", "pool=default", "dropout=0.4", "normalize=none"] in words


def test_descriptions_of_all_can_be_written():
    for entry in RECIPES.values():
        assert description(entry).endswith(f"fastcifar train --recipe {entry.name}")


@pytest.mark.parametrize(
    "arguments", [["recipes"], ["recipes", "r5_*"], ["reproduce", "r9_*"], ["reproduce"]], ids=" ".join
)
def test_listing_and_refusals_come_without_torch(arguments):
    code = (
        f"import sys; from fastcifar import cli; cli.main({json.dumps(arguments)}); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
