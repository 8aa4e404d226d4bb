"""Several networks as one: how they vote, which of them to keep, and how much they differ. Probabilities are
float64, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_EXHAUSTIVE = 12
"""Members of which all subsets are tried; there are 4,095."""
LEAST_PROBABILITY = 1e-300
"""What a probability of 0 counts as in the loss."""


def soft_vote(probabilities: Tensor) -> Tensor:
    """Probabilities float64 (M, N, C) of M members -> int64 (N,), the class of the greatest mean; of equal ones, the
    lowest label.
    """
    return probabilities.sum(dim=0).argmax(dim=1)


def hard_vote(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities float64 (M, N, C) -> int64 (N,), the class that most members choose, and bool (N,), where several
    had as many votes.

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
    values = table[first, second]
    values = values[~values.isnan()]
    return values.mean().item() if len(values) else None


@dataclass(frozen=True)
class Choice:
    """Some members, and what their soft vote came to where they were chosen."""

    members: tuple[int, ...]
    """Ascending."""
    accuracy: float
    """As a fraction."""
    loss: float
    """Mean negative log-likelihood of their mean probabilities."""

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better: accuracy first, which few images leave at few values, then the loss."""
        return self.accuracy, -self.loss


def judge(members: tuple[int, ...], summed: Tensor, labels: Tensor) -> Choice:
    """The soft vote of `members`, given the sum of their probabilities (N, C), and labels int64 (N,)."""
    correct = int((summed.argmax(dim=1) == labels).sum())
    likelihood = summed.gather(1, labels[:, None]) / len(members)
    return Choice(members, correct / len(labels), -likelihood.clamp_min(LEAST_PROBABILITY).log().mean().item())


def best_of_each_size(probabilities: Tensor, labels: Tensor) -> tuple[Choice, ...]:
    """The best subset of each size, from 1 to M: of all up to `MOST_EXHAUSTIVE` members, beyond them by `greedy`.

    Probabilities float64 (M, N, C), labels int64 (N,); of equal subsets, the one of the lower numbers.
    """
    if len(probabilities) > MOST_EXHAUSTIVE:
        return greedy(probabilities, labels)
    best: dict[int, Choice] = {}
    for members, summed in subset_sums(probabilities):
        choice = judge(members, summed, labels)
        if len(members) not in best or choice.rank > best[len(members)].rank:
            best[len(members)] = choice
    return tuple(best[size] for size in sorted(best))


def subset_sums(
    probabilities: Tensor, members: tuple[int, ...] = (), summed: Tensor | float = 0.0
) -> Iterator[tuple[tuple, Tensor]]:
    """Every subset that begins with `members`, in dictionary order, with the sum of its probabilities (N, C); an
    addition for each.
    """
    for member in range(members[-1] + 1 if members else 0, len(probabilities)):
        grown, total = (*members, member), summed + probabilities[member]
        yield grown, total
        yield from subset_sums(probabilities, grown, total)


def greedy(probabilities: Tensor, labels: Tensor) -> tuple[Choice, ...]:
    """The best member, then each time the one that helps most, until all are in: a choice of each size, from 1 to M.

    Caruana et al. 2004, "Ensemble selection from libraries of models", without replacement. Probabilities float64 (M,
    N, C), labels int64 (N,); of equal members, the one of the lower number.
    """
    path: list[Choice] = []
    summed, left = torch.zeros_like(probabilities[0]), list(range(len(probabilities)))
    while left:
        held = path[-1].members if path else ()
        choices = {member: judge((*held, member), summed + probabilities[member], labels) for member in left}
        added = max(left, key=lambda member: choices[member].rank)
        left.remove(added)
        summed = summed + probabilities[added]
        path.append(Choice(tuple(sorted(choices[added].members)), choices[added].accuracy, choices[added].loss))
    return tuple(path)


def select(probabilities: Tensor, labels: Tensor) -> Choice:
    """The best choice on the way of `greedy`; of equal ones, that of fewer members. Arguments as there."""
    return max(greedy(probabilities, labels), key=lambda choice: choice.rank)
