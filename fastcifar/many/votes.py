"""How several networks vote, which of them to keep, and how much they differ.

Probabilities are float64 (M, N, C) on the CPU, for M members, N images and C classes; labels are int64 (N,).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_EXHAUSTIVE = 12
"""Largest number of members of which all subsets (4,095) are tried."""
LEAST_PROBABILITY = 1e-300
"""Stands for a probability of 0 in the loss."""


def soft_vote(probabilities: Tensor) -> Tensor:
    """Returns the class of the greatest mean probability, int64 (N,); of equal ones, the lowest label."""
    return probabilities.sum(dim=0).argmax(dim=1)


def hard_vote(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the class that most members choose, int64 (N,), and where summed probability broke a tie, bool (N,)."""
    votes = F.one_hot(probabilities.argmax(dim=2), probabilities.shape[2]).sum(dim=0)
    leading = votes == votes.amax(dim=1, keepdim=True)
    winners = probabilities.sum(dim=0).masked_fill(~leading, -1.0).argmax(dim=1)
    return winners, leading.sum(dim=1) > 1


def disagreement(predictions: Tensor) -> float | None:
    """Predictions int64 (M, N) -> the share of images to which two members give different classes, mean over all pairs.

    None where there is no pair (Fort et al. 2019, arXiv:1912.02757, section 5, before they divide it by the error).
    """
    return mean_over_pairs((predictions[:, None] != predictions).double().mean(dim=2))


def q_statistic(right: Tensor) -> float | None:
    """Correct answers bool (M, N) -> Yule's Q of two members, mean over all pairs for which it is defined.

    It is 0 for members that err independently, 1 for those that err on the same images, and below 0 where they err on
    different ones (Kuncheva and Whitaker 2003, Machine Learning 51, equation 7). It is undefined where, say, a member
    never errs; None where that holds for all pairs.
    """
    hits, errors = right.double(), (~right).double()
    alike, unlike = (hits @ hits.T) * (errors @ errors.T), (hits @ errors.T) * (errors @ hits.T)
    return mean_over_pairs((alike - unlike) / (alike + unlike))


def mean_over_pairs(table: Tensor) -> float | None:
    """Returns the mean above the diagonal of float64 (M, M), without NaN; None where nothing is left."""
    first, second = torch.triu_indices(*table.shape, offset=1)
    mean = table[first, second].nanmean().item()
    return None if mean != mean else mean


@dataclass(frozen=True)
class Subset:
    """Some members, with the accuracy (a fraction) and loss of their soft vote on the images they were chosen by."""

    members: tuple[int, ...]
    accuracy: float
    loss: float
    """Mean negative log-likelihood of their mean probabilities."""

    @property
    def rank(self) -> tuple[float, float]:
        """The sort key, greater for better; the loss decides between equal accuracies, which few images make likely."""
        return self.accuracy, -self.loss


def judge(members: tuple[int, ...], summed: Tensor, labels: Tensor) -> Subset:
    """Judges the soft vote of `members`, given the sum of their probabilities (N, C)."""
    correct = int((summed.argmax(dim=1) == labels).sum())
    likelihood = summed.gather(1, labels[:, None]) / len(members)
    return Subset(members, correct / len(labels), -likelihood.clamp_min(LEAST_PROBABILITY).log().mean().item())


def best_of_each_size(probabilities: Tensor, labels: Tensor) -> tuple[Subset, ...]:
    """Finds the best subset of each size, 1 to M: of all for up to `MOST_EXHAUSTIVE` members, else by `greedy`.

    Of equal subsets, the one of the lower numbers is taken.
    """
    count = len(probabilities)
    if count > MOST_EXHAUSTIVE:
        return greedy(probabilities, labels)

    def judged(members: tuple[int, ...]) -> Subset:
        return judge(members, reduce(torch.add, (probabilities[member] for member in members)), labels)

    return tuple(
        max(map(judged, combinations(range(count), size)), key=lambda subset: subset.rank)
        for size in range(1, count + 1)
    )


def greedy(probabilities: Tensor, labels: Tensor) -> tuple[Subset, ...]:
    """Takes the best member, then each time the one that helps most: a subset of each size, from 1 to M.

    Caruana et al. 2004, "Ensemble selection from libraries of models", without replacement; lower numbers win ties.
    """
    path: list[Subset] = []
    held, summed = (), torch.zeros_like(probabilities[0])
    while len(held) < len(probabilities):
        left = [member for member in range(len(probabilities)) if member not in held]
        grown = [judge((*held, member), summed + probabilities[member], labels) for member in left]
        best = max(grown, key=lambda subset: subset.rank)
        held, summed = best.members, summed + probabilities[best.members[-1]]
        path.append(replace(best, members=tuple(sorted(held))))
    return tuple(path)


def select(probabilities: Tensor, labels: Tensor) -> Subset:
    """Returns the best of the `greedy` subsets; of equal ones, the smallest."""
    return max(greedy(probabilities, labels), key=lambda subset: subset.rank)
