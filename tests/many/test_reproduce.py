"""Reproducing recipes: finished runs are kept, stopped ones go on, and a failure does not stop the others."""

import json
import signal
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcifar import cli
from fastcifar.config import AverageConfig, DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import ConfigError, DataError, FastcifarError
from fastcifar.many import jobs as module
from fastcifar.many.jobs import Overrides
from fastcifar.many.reproduce import reproduce
from fastcifar.many.results import Row, read_rows, recipe_settings
from fastcifar.recipes import RECIPES, select
from fastcifar.recipes.registry import declare, derive
from fastcifar.runs.folder import Run

FLAGS = ["--device", "cpu", "--compile", "off", "--threads", "1"]
ENGINE = Overrides(engine=EngineConfig(device="cpu", compile="off", threads=1))
ONE_EPOCH = replace(ENGINE, epochs=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """Makes a data set of 8x8 images in two colours that are nearly the same."""
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 300)
    pictures = generator.integers(0, 100, (300, 8, 8, 3), dtype=np.uint8)
    pictures[..., 0] += (8 * labels[:, None, None]).astype(np.uint8)
    train = {"train_images": pictures[:200], "train_labels": labels[:200]}
    np.savez(path, **train, test_images=pictures[200:], test_labels=labels[200:])
    return str(path)


@pytest.fixture
def small(monkeypatch, images):
    """Makes recipes of a small network on small images, one a change of the other, and one that diverges at once."""
    # Drawing and measuring take most of the time of runs so short, and are tested elsewhere.
    monkeypatch.setattr("fastcifar.engine.run.draw_curves", lambda run, console: None)
    monkeypatch.setattr("fastcifar.engine.run.matmul_flops_per_second", lambda device, dtype: 1e12)
    for name in ("tiny", "tiny_flip", "tiny_diverging"):
        monkeypatch.setitem(RECIPES, name, None)
        del RECIPES[name]

    @declare("R9 T1", 0.2, "average")
    def tiny() -> RunConfig:
        network, data = ModelConfig("resnet", blocks=(1,), channels=(4,)), DataConfig(images, augment="none")
        return RunConfig(network, data, average=AverageConfig((0.9,)), batch_size=20, epochs=2, watch_test=True)

    @declare("R9 T1", 1.0)
    def tiny_flip() -> RunConfig:
        return derive(tiny(), augment="flip:0.5")

    @declare("R9 T1")
    def tiny_diverging() -> RunConfig:
        return derive(tiny(), lr=1e25)

    threads = torch.get_num_threads()
    yield tiny
    torch.set_num_threads(threads)


def trained(monkeypatch) -> list[str]:
    names = []
    original = module.train

    def noted(config, out, **options):
        names.append(f"{out.parent.name}/{out.name}")
        return original(config, out, **options)

    monkeypatch.setattr(module, "train", noted)
    return names


def test_rows_hold_what_the_runs_came_to(small, tmp_path, capsys):
    assert cli.main(["reproduce", "tiny*p", "tiny", "--epochs", "1", "--out", str(tmp_path), *FLAGS]) == 0
    printed = capsys.readouterr().out
    rows = read_rows(tmp_path / "results.json")
    assert [row.recipe for row in rows] == ["tiny", "tiny_flip"]
    for row in rows:
        result = Run.open(tmp_path / f"{row.recipe}-1ep" / "seed0").result()
        assert (row.test_accuracy, row.seconds) == (result.test_accuracy, result.seconds)
        assert row.average == result.averaged_test_accuracy
        assert row.watched_test_accuracy == result.watched_test_accuracy >= row.test_accuracy
        assert (row.epochs, row.full_length, row.seed, row.device) == (1, False, 0, result.device)
        assert row.settings == recipe_settings(RECIPES[row.recipe].config)
        line = next(line.split() for line in printed.splitlines() if line.startswith(f"{row.recipe} "))
        assert f"{100 * row.test_accuracy:.2f}" in line
        assert "met" not in line


def test_what_is_done_is_kept_and_more_seeds_are_added(small, tmp_path, monkeypatch):
    names = trained(monkeypatch)
    first = reproduce(select(["tiny"]), tmp_path, ENGINE)
    assert [row.full_length for row in first] == [True]
    again = reproduce(select(["tiny", "tiny_flip"]), tmp_path, ENGINE, seeds=2)
    assert names == ["tiny/seed0", "tiny_flip/seed0", "tiny/seed1", "tiny_flip/seed1"]
    assert first[0] in again
    assert len({row.test_accuracy for row in again}) > 1
    assert reproduce(select(["tiny"]), tmp_path, ENGINE) == [row for row in again if row.recipe == "tiny"]
    assert len(read_rows(tmp_path / "results.json")) == len(names) == 4


def test_rows_and_folders_each_outlive_the_other(small, tmp_path, monkeypatch):
    names = trained(monkeypatch)
    reproduce(select(["tiny"]), tmp_path / "here", ENGINE)
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "results.json").rename(tmp_path / "there" / "results.json")
    for folder in ("there", "here"):
        reproduce(select(["tiny"]), tmp_path / folder, ENGINE)
    assert names == ["tiny/seed0"]
    assert read_rows(tmp_path / "here" / "results.json") == read_rows(tmp_path / "there" / "results.json")


def test_stopped_and_started_again_ends_in_the_same_rows(small, tmp_path, monkeypatch, capsys):
    whole = reproduce(select(["tiny", "tiny_flip"]), tmp_path / "whole", ENGINE)
    original, run_epoch = module.train, Trainer.run_epoch

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return run_epoch(*arguments, **options)

    def stopped(config, out, **options):
        with monkeypatch.context() as patch:
            if out.parent.name == "tiny_flip":
                patch.setattr(Trainer, "run_epoch", interrupted)
            return original(config, out, **options)

    monkeypatch.setattr(module, "train", stopped)
    command = ["reproduce", "tiny", "tiny_flip", "--out", str(tmp_path / "stopped"), *FLAGS]
    assert cli.main(command) == 128 + signal.SIGINT
    assert "the same command goes on" in capsys.readouterr().err
    assert [row.recipe for row in read_rows(tmp_path / "stopped" / "results.json")] == ["tiny"]
    assert cli.main(command) == 0
    rows = read_rows(tmp_path / "stopped" / "results.json")
    assert [timeless(row) for row in rows] == [timeless(row) for row in whole]


def timeless(row: Row) -> Row:
    """Drops what depends on the hour; the checkout may move on in the meantime as well."""
    return replace(row, seconds=0.0, images_per_second=0.0, commit=None)


def test_one_that_fails_does_not_stop_the_others(small, tmp_path, monkeypatch):
    """The failed run's tensors are let go before the next: a kept error would hold its traceback."""
    genuine, held = module.train, []

    def watched(config, out, **options):
        if held:
            assert held[0]() is None
        network = torch.nn.Linear(3, 2)
        held.append(weakref.ref(network))
        return genuine(config, out, **options)

    monkeypatch.setattr(module, "train", watched)
    expected = r"1 of 2 runs failed \(.*tiny_diverging-1ep/seed0: the loss became infinite"
    with pytest.raises(FastcifarError, match=expected):
        reproduce(select(["tiny_diverging", "tiny"]), tmp_path, ONE_EPOCH)
    assert len(held) == 2
    assert [row.recipe for row in read_rows(tmp_path / "results.json")] == ["tiny"]


def test_members_of_an_ensemble_vote(small, tmp_path, monkeypatch, capsys):
    """A run's claim is the vote's; it is counted once for as many seeds, also when the command is given again."""
    members = replace(RECIPES["tiny"], config=derive(small(), val_split=40), measure="ensemble")
    monkeypatch.setitem(RECIPES, "tiny", members)
    command = ["reproduce", "tiny", "--seeds", "2", "--out", str(tmp_path), *FLAGS]
    assert cli.main(command) == 0
    written = json.loads((tmp_path / "tiny" / "ensemble.json").read_text())
    rows = read_rows(tmp_path / "results.json")
    assert [row.vote for row in rows] == [None, written["chosen"]["soft_accuracy"]]
    assert f"{100 * rows[1].vote:.2f}" in capsys.readouterr().out.splitlines()[-1]
    (tmp_path / "tiny" / "ensemble.json").unlink()
    assert cli.main(command) == 0
    assert not (tmp_path / "tiny" / "ensemble.json").exists()


def test_missing_data_stops_at_once(small, tmp_path, monkeypatch):
    def missing(config, out, **options):
        raise DataError("no data")

    monkeypatch.setattr(module, "train", missing)
    with pytest.raises(DataError, match="no data"):
        reproduce(select(["tiny"]), tmp_path, ENGINE)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("kept", ["row", "run"])
def test_a_run_of_another_reading_is_refused(small, tmp_path, kept):
    reproduce(select(["tiny"]), tmp_path, ONE_EPOCH)
    if kept == "run":
        (tmp_path / "results.json").unlink()
    changed = replace(RECIPES["tiny"], config=derive(small(), augment="flip:0.5", optimizer="sgd"))
    expected = r"as that recipe used to be \(augment, optimizer changed\); choose another --out"
    with pytest.raises(ConfigError, match=expected):
        reproduce([changed], tmp_path, ONE_EPOCH)


def test_settings_do_not_depend_on_the_machine_or_on_what_was_resolved(small, tmp_path):
    reproduce(select(["tiny"]), tmp_path, ONE_EPOCH)
    stored = Run.open(tmp_path / "tiny-1ep" / "seed0").config()
    assert stored.engine.threads is not None
    assert recipe_settings(stored) == recipe_settings(small())
    defaults = replace(
        RunConfig(), optim=OptimConfig(lr=0.1), data=DataConfig(augment="crop:4,flip:0.5", loader="torch")
    )
    assert recipe_settings(defaults) == {}


def test_refusals(small, tmp_path, capsys):
    for arguments, expected in [
        (["tiny", "--seeds", "0"], "seeds is 0; expected 1 or more"),
        (["tinny"], "did you mean tiny"),
        ([], "required: RECIPES"),
    ]:
        assert cli.main(["reproduce", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
