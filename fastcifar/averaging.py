"""Averages of the weights along the run, kept beside the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from fastcifar.kernels.averaging import ema_update_

ALIGNMENT = 16
"""Elements: 64 bytes."""


class Buckets:
    """A model's parameters and its buffers, each moved into one flat float32 tensor of which they become views.

    So whatever runs over all weights is one kernel. Shapes and strides (channels_last) stay. Parameters and buffers are kept apart, because
    a forward pass writes the buffers, and a compiled one must see that it does not write the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters, buffers = list(model.parameters()), list(model.buffers())
        self.flat = (flatten(parameters), flatten(buffers))


def flatten(tensors: list[Tensor]) -> Tensor:
    """One float32 tensor with the contents of `tensors`, each of which is repointed to its part of it.

    Every part starts at a multiple of `ALIGNMENT` elements, with zeros between: the compiler copies what it finds less aligned at every
    call, and kernels over the whole load 16 bytes at a time.
    """
    offsets = list(accumulate((-(-tensor.numel() // ALIGNMENT) * ALIGNMENT for tensor in tensors), initial=0))
    flat = torch.zeros(offsets[-1], dtype=torch.float32, device=tensors[0].device if tensors else None)
    for tensor, offset in zip(tensors, offsets, strict=False):
        view = flat.as_strided(tensor.size(), tensor.stride(), offset)
        view.copy_(tensor.detach())
        tensor.data = view
    return flat


def decay_table(decay: float, steps: int) -> Tensor:
    """The decay of each step, float32 (steps,): `min(decay, (1 + step) / (10 + step))`, so that the start is soon forgotten.

    The warm-up is TensorFlow's `ExponentialMovingAverage(num_updates=...)`.
    """
    step = torch.arange(steps, dtype=torch.float64)
    return torch.minimum((1 + step) / (10 + step), torch.tensor(decay, dtype=torch.float64)).float()


class ExponentialAverage:
    """An exponential moving average of all parameters and buffers.

    Args:
        buckets: the weights to follow.
        decay: the share of the old average kept in a step, once warmed up.
        steps: length of the run.
    """

    def __init__(self, buckets: Buckets, decay: float, steps: int) -> None:
        self.sources = buckets.flat
        self.averages = tuple(source.clone() for source in self.sources)
        self.decays = decay_table(decay, steps).to(self.sources[0].device)

    def update(self, step: int) -> None:
        """Takes in the weights after `step`, counted from 0."""
        for average, source in zip(self.averages, self.sources, strict=True):
            ema_update_(average, source, self.decays[step])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the model holds the averaged weights; after it, its own again, to the bit."""
        kept = [source.clone() for source in self.sources]
        try:
            self.copy(self.averages, self.sources)
            yield
        finally:
            self.copy(kept, self.sources)

    @staticmethod
    def copy(origins: tuple[Tensor, ...] | list[Tensor], targets: tuple[Tensor, ...]) -> None:
        for origin, target in zip(origins, targets, strict=True):
            target.copy_(origin)
