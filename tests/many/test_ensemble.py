"""Votes, choices and diversity against plain Python on made-up probabilities, and the command on runs made by hand."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import make_data, make_run

from fastcifar import cli
from fastcifar.data.sources import load_dataset
from fastcifar.data.splits import validation_split
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.inference.classifier import open_classifier
from fastcifar.many import votes as module
from fastcifar.many.ensemble import evaluate_ensemble, lines_of
from fastcifar.many.votes import (
    best_of_each_size,
    disagreement,
    greedy,
    hard_vote,
    judge,
    q_statistic,
    select,
    soft_vote,
)
from fastcifar.runs.ensembles import parse_seeds, read_report, voters


def made_up(members: int, images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in which the label is somewhat likelier, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(members, images, classes, generator=generator, dtype=torch.float64)
    logits += 1.5 * torch.nn.functional.one_hot(labels, classes)
    return logits.softmax(dim=2), labels


@pytest.mark.parametrize(("members", "images", "classes"), [(1, 7, 3), (4, 301, 10), (5, 64, 2)])
def test_votes_as_counted_by_hand(members, images, classes):
    probabilities, _ = made_up(members, images, classes)
    soft, (hard, tied) = soft_vote(probabilities), hard_vote(probabilities)
    for i in range(images):
        rows = probabilities[:, i].tolist()
        sums = [sum(row[c] for row in rows) for c in range(classes)]
        votes = [sum(max(range(classes), key=row.__getitem__) == c for row in rows) for c in range(classes)]
        leaders = [c for c in range(classes) if votes[c] == max(votes)]
        assert soft[i] == max(range(classes), key=sums.__getitem__)
        assert hard[i] == max(leaders, key=sums.__getitem__)
        assert tied[i] == (len(leaders) > 1)
    assert bool(tied.any()) == (members == 4)


def test_a_tie_goes_to_the_summed_probability_among_the_tied_only():
    """Two votes to two; a third class, which none chooses, has more probability than either."""
    rows = [[0.51, 0.0, 0.49], [0.51, 0.0, 0.49], [0.0, 0.52, 0.48], [0.0, 0.53, 0.47]]
    probabilities = torch.tensor(rows, dtype=torch.float64)[:, None]
    assert soft_vote(probabilities).tolist() == [2]
    winners, tied = hard_vote(probabilities)
    assert (winners.tolist(), tied.tolist()) == ([1], [True])


def test_diversity_as_counted_pair_by_pair():
    probabilities, labels = made_up(5, 97, 4)
    predictions = probabilities.argmax(dim=2)
    differing, q = [], []
    for one, other in combinations(predictions.numpy(), 2):
        differing.append(np.mean(one != other))
        first, second = one == labels.numpy(), other == labels.numpy()
        n11, n00 = np.sum(first & second), np.sum(~first & ~second)
        n10, n01 = np.sum(first & ~second), np.sum(~first & second)
        q.append((n11 * n00 - n01 * n10) / (n11 * n00 + n01 * n10))
    assert disagreement(predictions) == pytest.approx(np.mean(differing), rel=1e-12)
    assert q_statistic(predictions == labels) == pytest.approx(np.mean(q), rel=1e-12)


def test_diversity_at_its_ends():
    right = torch.tensor([[True, False, True, False]])
    assert q_statistic(right.repeat(3, 1)) == 1.0
    assert q_statistic(torch.cat([right, ~right])) == -1.0
    never_errs = torch.cat([right, torch.ones_like(right)])
    assert q_statistic(never_errs) is None
    assert q_statistic(torch.cat([never_errs, right])) == 1.0  # of the one pair for which it is defined
    assert disagreement(torch.tensor([[0, 1, 2]])) is None
    assert disagreement(torch.tensor([[0, 1, 2], [0, 2, 2]])) == pytest.approx(1 / 3)


def score(probabilities: torch.Tensor, labels: torch.Tensor, members: tuple[int, ...]) -> tuple[float, float]:
    """Accuracy and negated loss of a subset, in numpy."""
    mean = probabilities.numpy()[list(members)].mean(axis=0)
    loss = -np.log(mean[np.arange(len(labels)), labels.numpy()]).mean()
    return np.mean(mean.argmax(axis=1) == labels.numpy()), -loss


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_each_size_is_found_among_all_subsets(seed):
    probabilities, labels = made_up(6, 80, 5, seed)
    found = best_of_each_size(probabilities, labels)
    assert [len(choice.members) for choice in found] == [1, 2, 3, 4, 5, 6]
    for choice in found:
        every = [score(probabilities, labels, members) for members in combinations(range(6), len(choice.members))]
        assert choice.rank == pytest.approx(score(probabilities, labels, choice.members), rel=1e-12)
        assert choice.rank == pytest.approx(max(every), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_adds_what_helps_most(seed):
    probabilities, labels = made_up(7, 60, 4, seed)
    path, held = greedy(probabilities, labels), ()
    for choice in path:
        left = [member for member in range(7) if member not in held]
        added = max(left, key=lambda member: score(probabilities, labels, (*held, member)))
        held = (*held, added)
        assert choice.members == tuple(sorted(held))
        assert choice.rank == pytest.approx(score(probabilities, labels, held), rel=1e-12)
    chosen = select(probabilities, labels)
    assert chosen.rank == max(choice.rank for choice in path)


def test_a_member_that_spoils_the_vote_is_left_out():
    probabilities, labels = made_up(3, 200, 4)
    wrong = torch.nn.functional.one_hot((labels + 1) % 4, 4).double()
    assert select(torch.cat([probabilities, wrong[None]]), labels).members == (0, 1, 2)


def test_equal_subsets_go_to_the_lower_number_and_the_fewer():
    probabilities, labels = made_up(1, 50, 3)
    alike = probabilities.repeat(2, 1, 1)
    assert select(alike, labels).members == (0,)
    assert next(choice.members for choice in best_of_each_size(alike, labels)) == (0,)


def test_many_members_are_chosen_greedily(monkeypatch):
    probabilities, labels = made_up(5, 40, 3)
    monkeypatch.setattr(module, "MOST_EXHAUSTIVE", 4)
    assert best_of_each_size(probabilities, labels) == greedy(probabilities, labels)


def test_a_certain_error_has_a_finite_loss():
    choice = judge((0,), torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([1]))
    assert choice.accuracy == 0
    assert 600 < choice.loss < 700


@pytest.mark.parametrize(
    ("text", "seeds"), [("0..3", (0, 1, 2, 3)), ("4", (4,)), ("7,2", (7, 2)), ("0..1, 5", (0, 1, 5))]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "3..1", "a", "0..", "-1", "0..99999", "1,,2"])
def test_seeds_that_are_none(text):
    with pytest.raises(ConfigError, match=r"are not known; write 0\.\.10"):
        parse_seeds(text)


def test_a_seed_named_twice():
    with pytest.raises(ConfigError, match="name one twice"):
        parse_seeds("0..3,2")


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    """Runs of several seeds, which set the same images apart all the same."""
    data = make_data(tmp_path)
    return [make_run(tmp_path / f"run{seed}", data, seed=10 * seed, run_seed=seed, val_split=20) for seed in range(4)]


def probabilities_of(runs: list[Path], images: torch.Tensor) -> np.ndarray:
    return np.stack([open_classifier(run).probabilities(images).numpy() for run in runs])


def test_the_report(four, tmp_path):
    report = evaluate_ensemble(four, tmp_path / "together")
    data = str(tmp_path / "data.npz")
    train, test = load_dataset(data, "train"), load_dataset(data, "test")
    _, apart = validation_split(train.labels, 20, 0, 3)
    known, labels = probabilities_of(four, train.images[apart]), train.labels[apart].numpy()
    tested = probabilities_of(four, test.images)
    by_member = (tested.argmax(axis=2) == test.labels.numpy()).mean(axis=1)
    assert [one.test_accuracy for one in report.members] == pytest.approx(by_member)
    assert [one.validation_accuracy for one in report.members] == pytest.approx(
        (known.argmax(axis=2) == labels).mean(axis=1)
    )
    assert [one.run for one in report.members] == four
    for one in (report.whole, report.chosen, *report.sizes):
        members = list(one.members)
        right = tested[members].mean(axis=0).argmax(axis=1) == test.labels.numpy()
        assert one.soft_accuracy == right.mean()
        assert one.soft_interval[0] < one.soft_accuracy < one.soft_interval[1]
        assert one.validation_accuracy == (known[members].mean(axis=0).argmax(axis=1) == labels).mean()
        assert (one.mean_member, one.best_member) == pytest.approx(
            (by_member[members].mean(), by_member[members].max())
        )
    assert report.whole.members == (0, 1, 2, 3)
    assert report.chosen.members == select(torch.tensor(known), torch.tensor(labels)).members
    assert report.best == report.chosen
    assert [len(one.members) for one in report.sizes] == [1, 2, 3, 4]
    assert read_report(tmp_path / "together") == report


def test_the_choice_does_not_see_the_test_set(four, tmp_path, monkeypatch):
    """It is read once, after the choice."""
    opened = []
    monkeypatch.setattr(
        "fastcifar.many.ensemble.load_dataset",
        lambda name, split, *rest: opened.append(split) or load_dataset(name, split, *rest),
    )
    monkeypatch.setattr("fastcifar.many.ensemble.select", lambda *known: opened.append("choice") or select(*known))
    evaluate_ensemble(four, tmp_path / "together")
    assert opened == ["train", "choice", "test"]


@pytest.mark.parametrize(
    ("splits", "reason"),
    [
        (({"val_split": 20}, {}), "not all runs set images apart"),
        (({"val_split": 20}, {"val_split": 30}), "set different images apart"),
        (({"val_split": 20}, {"val_split": 20, "split_seed": 1}), "set different images apart"),
    ],
)
def test_without_a_common_split_all_vote(tmp_path, splits, reason):
    data = make_data(tmp_path)
    runs = [make_run(tmp_path / f"run{seed}", data, seed=10 * seed, **split) for seed, split in enumerate(splits)]
    report = evaluate_ensemble(runs, tmp_path / "together")
    assert (report.chosen, report.sizes, report.best) == (None, (), report.whole)
    assert reason in report.not_chosen
    assert reason in list(lines_of(report))[-1]


def test_the_command(four, tmp_path, capsys):
    out = tmp_path / "together"
    assert cli.main(["ensemble", *map(str, four), "--out", str(out), "--weights", "weights", "--tta", "mirror"]) == 0
    printed = capsys.readouterr().out
    report = read_report(out)
    assert (report.tta, {one.weights for one in report.members}) == ("mirror", {"weights"})
    chosen = next(line.split() for line in printed.splitlines() if line.startswith("chosen "))
    assert chosen[1:3] == [
        f"{100 * report.chosen.validation_accuracy:.2f}%",
        f"{100 * report.chosen.soft_accuracy:.2f}%",
    ]
    assert chosen[-1] == ",".join(map(str, report.chosen.members))
    assert f"by the soft vote of {len(report.chosen.members)} chosen on the validation split" in printed
    assert printed.endswith(f"{out / 'ensemble.json'}\n")


def test_snapshots_are_members(tmp_path):
    """All of them, of every run that keeps any; with weights that are named, each run is one."""
    data = make_data(tmp_path)
    runs = [
        make_run(tmp_path / name, data, seed=10 * kept, snapshots=kept)
        for kept, name in enumerate(("none", "one", "two"))
    ]
    of_two = [(runs[2], "snapshot-1"), (runs[2], "snapshot-2")]
    together = evaluate_ensemble(runs, tmp_path / "together")
    assert [(one.run, one.weights) for one in together.members] == [
        (runs[0], "ema-0.999"),
        (runs[1], "snapshot-1"),
        *of_two,
    ]
    alone, test = evaluate_ensemble(runs[2:], tmp_path / "alone"), load_dataset(str(data), "test")
    assert voters(tmp_path / "alone") == of_two
    outputs = torch.stack([open_classifier(*member).probabilities(test.images) for member in of_two])
    assert alone.whole.soft_accuracy == (soft_vote(outputs) == test.labels).double().mean()
    assert [one.test_accuracy for one in alone.members] == [
        (one.argmax(dim=1) == test.labels).double().mean() for one in outputs
    ]
    named = evaluate_ensemble(runs, tmp_path / "named", which="ema-0.999")
    assert [one.weights for one in named.members] == ["ema-0.999"] * 3
    with pytest.raises(ConfigError, match="or one that was trained with --snapshots"):
        evaluate_ensemble(runs[1:2], tmp_path / "single")


def test_members_within_the_folder_move_with_it(tmp_path):
    data, out = make_data(tmp_path), tmp_path / "here"
    runs = [make_run(out / f"seed{seed}", data, seed=10 * seed) for seed in range(2)]
    report = evaluate_ensemble(runs, out)
    assert [str(one.run) for one in report.members] == ["seed0", "seed1"]
    out.rename(tmp_path / "there")
    assert voters(tmp_path / "there") == [(tmp_path / "there" / f"seed{seed}", "ema-0.999") for seed in range(2)]


def test_a_report_that_names_no_member(four, tmp_path):
    evaluate_ensemble(four, tmp_path)
    content = json.loads((tmp_path / "ensemble.json").read_text())
    content["chosen"]["members"] = [4]
    (tmp_path / "ensemble.json").write_text(json.dumps(content))
    with pytest.raises(FastcifarError, match="names member 4 of 4"):
        voters(tmp_path)


def test_refusals(four, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    stranger = make_run(tmp_path / "stranger", make_data(tmp_path / "other"))
    for arguments, expected in [
        ([], "an ensemble is of runs or of a recipe"),
        (["--recipe", "quickstart", str(four[0])], "an ensemble is of runs or of a recipe"),
        ([*map(str, four), "--epochs", "3"], "are for training; name a --recipe"),
        ([*map(str, four), "--threads", "1"], "are for training; name a --recipe"),
        ([str(four[0])], "an ensemble takes two members or more"),
        ([str(four[0]), str(four[1]), f"{four[0]}/"], "is named twice; each run votes once"),
        ([str(four[0]), str(four[1]), "--weights", "swa"], "unknown weights 'swa'"),
        (["--recipe", "quickstart", "--seeds", "3"], "an ensemble takes two members or more; give more --seeds"),
        ([str(four[0]), "nowhere"], "nowhere is no run"),
        ([str(four[0]), str(stranger)], "give runs on the same data set"),
        (["--recipe", "quickstart", "--seeds", "3..1"], "write 0..10, which is 11 seeds"),
        (["--recipe", "quickstrat"], "did you mean quickstart"),
    ]:
        assert cli.main(["ensemble", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
