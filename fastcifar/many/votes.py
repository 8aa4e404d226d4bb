"""Several networks as one: how they vote, which of them to keep, and how much they differ.

Probabilities are float64 (M, N, C) on the CPU, of M members, N images and C classes; labels are int64 (N,).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_EXHAUSTIVE = 12
"""Members of which all subsets are tried; there are 4,095."""
LEAST_PROBABILITY = 1e-300
"""What a probability of 0 counts as in the loss."""


def soft_vote(probabilities: Tensor) -> Tensor:
    """int64 (N,), the class of the greatest mean probability; of equal ones, the lowest label."""
    return probabilities.sum(dim=0).argmax(dim=1)


def hard_vote(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """int64 (N,), the class that most members choose, and bool (N,), where several classes had as many votes.

    Among those the greatest summed probability decides.
    """
    votes = F.one_hot(probabilities.argmax(dim=2), probabilities.shape[2]).sum(dim=0)
    leading = votes == votes.amax(dim=1, keepdim=True)
    winners = probabilities.sum(dim=0).masked_fill(~leading, -1.0).argmax(dim=1)
    return winners, leading.sum(dim=1) > 1


def disagreement(predictions: Tensor) -> float | None:
    """Predictions int64 (M, N) -> the share of images to which two members give different classes, mean over all pairs.

    None where there is no pair. Fort et al. 2019, arXiv:1912.02757, section 5, before they divide it by the error.
    """
    return mean_over_pairs((predictions[:, None] != predictions).double().mean(dim=2))


def q_statistic(right: Tensor) -> float | None:
    """Right answers bool (M, N) -> Yule's Q of two members' right answers, mean over all pairs for which it is defined.

    It is 0 for members that err independently, 1 for those that err on the same images, and below 0 where they err on
    different ones (Kuncheva and Whitaker 2003, Machine Learning 51, equation 7). It is undefined where, say, a member
    never errs; None where it always is.
    """
    hits, errors = right.double(), (~right).double()
    alike, unlike = (hits @ hits.T) * (errors @ errors.T), (hits @ errors.T) * (errors @ hits.T)
    return mean_over_pairs((alike - unlike) / (alike + unlike))


def mean_over_pairs(table: Tensor) -> float | None:
    """The mean of what stands above the diagonal of float64 (M, M), NaN left out; None where nothing is left."""
    first, second = torch.triu_indices(*table.shape, offset=1)
    mean = table[first, second].nanmean().item()
    return None if mean != mean else mean


@dataclass(frozen=True)
class Subset:
    """Some members, and what their soft vote came to where they were chosen."""

    members: tuple[int, ...]
    accuracy: float
    """As a fraction."""
    loss: float
    """Mean negative log-likelihood of their mean probabilities."""

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better. The loss decides between equal accuracies, which few images make likely."""
        return self.accuracy, -self.loss


def judge(members: tuple[int, ...], summed: Tensor, labels: Tensor) -> Subset:
    """The soft vote of `members`, given the sum of their probabilities (N, C)."""
    correct = int((summed.argmax(dim=1) == labels).sum())
    likelihood = summed.gather(1, labels[:, None]) / len(members)
    return Subset(members, correct / len(labels), -likelihood.clamp_min(LEAST_PROBABILITY).log().mean().item())


def best_of_each_size(probabilities: Tensor, labels: Tensor) -> tuple[Subset, ...]:
    """The best subset of each size, from 1 to M: of all up to `MOST_EXHAUSTIVE` members, beyond them by `greedy`.

    Of equal subsets, it is the one of the lower numbers.
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
    """The best member, then each time the one that helps most, until all are in: a subset of each size, from 1 to M.

    Caruana et al. 2004, "Ensemble selection from libraries of models", without replacement. Of equal members, it is the
    one of the lower number.
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
    """The best subset on the way of `greedy`; of equal ones, that of fewer members."""
    return max(greedy(probabilities, labels), key=lambda subset: subset.rank)
