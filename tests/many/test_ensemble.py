"""Several runs together: the report against plainer code, the command, and its refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import logits_of, make_data, make_run

from fastcifar import cli
from fastcifar.data.sources import load_dataset
from fastcifar.data.splits import validation_split
from fastcifar.errors import ConfigError
from fastcifar.many.ensemble import SPLIT_OBSTACLES, evaluate_ensemble, lines_of
from fastcifar.many.votes import select
from fastcifar.runs.ensembles import read_report, voters
from fastcifar.runs.network import DEFAULT, LoadOptions


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path)


@pytest.fixture
def four(tmp_path: Path, data: Path) -> list[Path]:
    """Makes runs of several seeds, all of which set the same images apart."""
    return [make_run(tmp_path / f"run{seed}", data, seed=10 * seed, run_seed=seed, val_split=20) for seed in range(4)]


def shares_of(members: list[tuple[Path, str]], images: torch.Tensor) -> np.ndarray:
    return np.stack([logits_of(run, images, weights).double().softmax(1).numpy() for run, weights in members])


def test_the_report(four, data, tmp_path):
    report = evaluate_ensemble(four, tmp_path / "together", DEFAULT)
    train, test = load_dataset(str(data), "train"), load_dataset(str(data), "test")
    _, apart = validation_split(train.labels, 20, 0, 3)
    members = [(run, "ema-0.999") for run in four]
    known, labels = shares_of(members, train.images[apart]), train.labels[apart].numpy()
    tested = shares_of(members, test.images)
    by_member = (tested.argmax(axis=2) == test.labels.numpy()).mean(axis=1)
    validated = (known.argmax(axis=2) == labels).mean(axis=1)
    assert [one.test_accuracy for one in report.members] == pytest.approx(by_member)
    assert [one.validation_accuracy for one in report.members] == pytest.approx(validated)
    assert [one.run for one in report.members] == four
    for vote in (report.whole, report.chosen, *report.sizes):
        part = list(vote.members)
        right = tested[part].mean(axis=0).argmax(axis=1) == test.labels.numpy()
        assert vote.soft_accuracy == right.mean()
        assert vote.soft_interval[0] < vote.soft_accuracy < vote.soft_interval[1]
        assert vote.validation_accuracy == (known[part].mean(axis=0).argmax(axis=1) == labels).mean()
        assert (vote.mean_member, vote.best_member) == pytest.approx((by_member[part].mean(), by_member[part].max()))
    assert report.whole.members == (0, 1, 2, 3)
    assert report.chosen.members == select(torch.tensor(known), torch.tensor(labels)).members
    assert report.best == report.chosen
    assert [len(vote.members) for vote in report.sizes] == [1, 2, 3, 4]
    assert read_report(tmp_path / "together") == report


def test_the_choice_does_not_see_the_test_set(four, tmp_path, monkeypatch):
    """The test set is read once, after the choice."""
    opened = []
    monkeypatch.setattr(
        "fastcifar.many.ensemble.load_dataset",
        lambda name, split, *rest: opened.append(split) or load_dataset(name, split, *rest),
    )
    monkeypatch.setattr("fastcifar.many.ensemble.select", lambda *known: opened.append("choice") or select(*known))
    evaluate_ensemble(four, tmp_path / "together", DEFAULT)
    assert opened == ["train", "choice", "test"]


@pytest.mark.parametrize(
    ("splits", "obstacle"),
    [
        (({"val_split": 20}, {}), "no-split"),
        (({"val_split": 20}, {"val_split": 30}), "different-splits"),
        (({"val_split": 20}, {"val_split": 20, "split_seed": 1}), "different-splits"),
    ],
)
def test_without_a_common_split_all_vote(tmp_path, data, splits, obstacle):
    runs = [make_run(tmp_path / f"run{seed}", data, seed=10 * seed, **split) for seed, split in enumerate(splits)]
    report = evaluate_ensemble(runs, tmp_path / "together", DEFAULT)
    assert (report.chosen, report.sizes, report.best, report.not_chosen) == (None, (), report.whole, obstacle)
    assert SPLIT_OBSTACLES[obstacle] in list(lines_of(report))[-1]
    assert read_report(tmp_path / "together") == report


def test_the_command(four, tmp_path, capsys):
    out = tmp_path / "together"
    assert cli.main(["ensemble", *map(str, four), "--out", str(out), "--weights", "weights", "--tta", "mirror"]) == 0
    printed, report = capsys.readouterr().out, read_report(out)
    assert (report.tta, {one.weights for one in report.members}) == ("mirror", {"weights"})
    line = next(line.split() for line in printed.splitlines() if line.startswith("chosen "))
    accuracies = report.chosen.validation_accuracy, report.chosen.soft_accuracy
    assert line[1:3] == [f"{100 * accuracy:.2f}%" for accuracy in accuracies]
    assert line[-1] == ",".join(map(str, report.chosen.members))
    assert f"by the soft vote of {len(report.chosen.members)} chosen on the validation split" in printed
    assert printed.endswith(f"{out / 'ensemble.json'}\n")


def test_snapshots_are_members(tmp_path, data):
    """All snapshots of every run count; with weights that are named, each run is one member."""
    runs = [
        make_run(tmp_path / name, data, seed=10 * kept, snapshots=kept)
        for kept, name in enumerate(("none", "one", "two"))
    ]
    of_two = [(runs[2], "snapshot-1"), (runs[2], "snapshot-2")]
    together = evaluate_ensemble(runs, tmp_path / "together", DEFAULT)
    members = [(one.run, one.weights) for one in together.members]
    assert members == [(runs[0], "ema-0.999"), (runs[1], "snapshot-1"), *of_two]
    alone, test = evaluate_ensemble(runs[2:], tmp_path / "alone", DEFAULT), load_dataset(str(data), "test")
    assert voters(tmp_path / "alone") == of_two
    shares = shares_of(of_two, test.images)
    assert alone.whole.soft_accuracy == (shares.mean(axis=0).argmax(axis=1) == test.labels.numpy()).mean()
    named = evaluate_ensemble(runs, tmp_path / "named", LoadOptions("ema-0.999"))
    assert [one.weights for one in named.members] == ["ema-0.999"] * 3
    with pytest.raises(ConfigError, match="or one that was trained with --snapshots"):
        evaluate_ensemble(runs[1:2], tmp_path / "single", DEFAULT)


def test_members_within_the_folder_move_with_it(tmp_path, data):
    out = tmp_path / "here"
    runs = [make_run(out / f"seed{seed}", data, seed=10 * seed) for seed in range(2)]
    report = evaluate_ensemble(runs, out, DEFAULT)
    assert [str(one.run) for one in report.members] == ["seed0", "seed1"]
    out.rename(tmp_path / "there")
    assert voters(tmp_path / "there") == [(tmp_path / "there" / f"seed{seed}", "ema-0.999") for seed in range(2)]


def test_refusals(four, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    stranger = make_run(tmp_path / "stranger", make_data(tmp_path / "other"))
    first, second = map(str, four[:2])
    for arguments, expected in [
        ([], "an ensemble is of runs or of a recipe"),
        (["--recipe", "quickstart", first], "an ensemble is of runs or of a recipe"),
        ([first, second, "--threads", "1"], "are for training; name a --recipe"),
        ([first], "an ensemble takes two members or more"),
        ([first, second, f"{first}/"], "is named twice; each run votes once"),
        ([first, second, "--weights", "swa"], "unknown weights 'swa'"),
        (["--recipe", "quickstart", "--seeds", "3"], "an ensemble takes two members or more; give more --seeds"),
        ([first, "nowhere"], "nowhere is no run"),
        ([first, str(stranger)], "give runs on the same data set"),
        (["--recipe", "quickstrat"], "did you mean quickstart"),
    ]:
        assert cli.main(["ensemble", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
