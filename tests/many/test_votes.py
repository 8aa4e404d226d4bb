"""Votes, choices and diversity against plain Python on made-up probabilities."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from fastcifar.many import votes as module
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


def made_up(members: int, images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
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
    """There are two votes to two; a third class, which none chooses, has more probability than either."""
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


def score(probabilities: torch.Tensor, labels: torch.Tensor, members: tuple[int, ...]) -> tuple[float, float]:
    mean = probabilities.numpy()[list(members)].mean(axis=0)
    loss = -np.log(mean[np.arange(len(labels)), labels.numpy()]).mean()
    return np.mean(mean.argmax(axis=1) == labels.numpy()), -loss


@pytest.mark.parametrize("seed", range(2))
def test_the_best_of_each_size_is_found_among_all_subsets(seed):
    probabilities, labels = made_up(6, 80, 5, seed)
    found = best_of_each_size(probabilities, labels)
    assert [len(subset.members) for subset in found] == [1, 2, 3, 4, 5, 6]
    for subset in found:
        every = [score(probabilities, labels, members) for members in combinations(range(6), len(subset.members))]
        assert subset.rank == pytest.approx(score(probabilities, labels, subset.members), rel=1e-12)
        assert subset.rank == pytest.approx(max(every), rel=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_greedy_adds_what_helps_most(seed, monkeypatch):
    """Where there are many members it chooses instead of a search among all subsets."""
    probabilities, labels = made_up(7, 60, 4, seed)
    path, held = greedy(probabilities, labels), ()
    for subset in path:
        left = [member for member in range(7) if member not in held]
        added = max(left, key=lambda member: score(probabilities, labels, (*held, member)))
        held = (*held, added)
        assert subset.members == tuple(sorted(held))
        assert subset.rank == pytest.approx(score(probabilities, labels, held), rel=1e-12)
    assert select(probabilities, labels).rank == max(subset.rank for subset in path)
    monkeypatch.setattr(module, "MOST_EXHAUSTIVE", 6)
    assert best_of_each_size(probabilities, labels) == path


def test_equal_subsets_go_to_the_lower_number_and_the_fewer():
    probabilities, labels = made_up(1, 50, 3)
    alike = probabilities.repeat(2, 1, 1)
    assert select(alike, labels).members == (0,)
    assert best_of_each_size(alike, labels)[0].members == (0,)


def test_a_certain_error_has_a_finite_loss():
    subset = judge((0,), torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([1]))
    assert subset.accuracy == 0
    assert 600 < subset.loss < 700
