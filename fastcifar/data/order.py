"""The samples of an epoch and their order."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcifar.augment.random import Key, Stream, epoch_seed
from fastcifar.errors import ConfigError


class Order:
    """The order of every epoch, a function of (seed, epoch); arguments as in `Loader`.

    Raises:
        ConfigError: an argument does not suit the data set.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        *,
        shuffle: bool,
        mask: Tensor | None,
        weights: Tensor | None,
        rank: int,
        world_size: int,
    ) -> None:
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed {seed} is out of range; give one from 0 to {2**32 - 1}.")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (count,)):
            raise ConfigError(f"mask is {mask.dtype} {tuple(mask.shape)}; expected bool ({count},).")
        if weights is not None and (weights.shape != (count,) or not bool((weights >= 0).all())):
            raise ConfigError(f"weights are {tuple(weights.shape)}; expected ({count},), none of them negative.")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size} is out of range; give one from 0 to {world_size - 1}.")
        self.seed, self.shuffle, self.rank, self.world_size = seed, shuffle, rank, world_size
        self.taken = torch.arange(count) if mask is None else mask.cpu().nonzero()[:, 0]
        self.cumulated = None if weights is None else weights.cpu().double()[self.taken].cumsum(0)
        if self.cumulated is not None and not (len(self.taken) and 0 < float(self.cumulated[-1]) < float("inf")):
            raise ConfigError(
                "weights have no finite sum above 0 over the samples to take; give at least one a weight."
            )

    def __len__(self) -> int:
        """Samples an epoch for this rank."""
        return len(self.taken) // self.world_size

    def epoch(self, epoch: int) -> Tensor:
        """Indices in the data set, int64 (len(self),), on the CPU."""
        generator = torch.Generator().manual_seed(epoch_seed(Key(self.seed, epoch), Stream.ORDER))
        count = len(self.taken)
        if self.cumulated is not None:
            drawn = torch.rand(count, dtype=torch.float64, generator=generator) * self.cumulated[-1]
            places = torch.searchsorted(self.cumulated, drawn, right=True).clamp(max=count - 1)
        else:
            places = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        return self.taken[places[self.rank : len(self) * self.world_size : self.world_size]]
