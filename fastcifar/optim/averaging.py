"""Averages of the weights during a run, kept beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from fastcifar.errors import ConfigError
from fastcifar.kernels.averaging import ema_update_
from fastcifar.optim import AverageConfig, average_name
from fastcifar.optim.course import Duration

ALIGNMENT = 16
"""A number of elements, which take 64 bytes."""

SWA = "swa"

Flat = tuple[Tensor, ...]
"""All parameters and all buffers of a model: two float32 vectors."""


class Buckets:
    """Moves a model's parameters and its buffers into one flat float32 tensor each, of which they become views.

    So an operation over all weights is one kernel. Shapes and strides (channels_last) stay. Parameters and buffers are
    separate, because a forward pass writes the buffers, and a compiled one must see that it does not write the
    parameters. Integer buffers, whose average would mean nothing, are left where they are.

    Raises:
        ConfigError: weights that are not float32.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        for tensor in (*parameters, *buffers):
            if tensor.dtype != torch.float32:
                raise ConfigError(
                    f"the network has weights of type {tensor.dtype}; expected float32, which autocast turns to "
                    "lower precision."
                )
        self.flat = (flatten(parameters), flatten(buffers))
        self.views = {id(buffer): buffer for buffer in buffers}
        """The buffers that lie in `flat`, by identity."""
        self.places = [(module._buffers, name) for module in model.modules() for name in module._buffers]
        """The dictionary that holds each buffer, which may be None for now, and its name there."""

    def keep_buffers(self) -> Callable[[], None]:
        """Returns a function that makes the buffers what they are now, except for the values in `flat`.

        Until it is called, a forward pass may write into a buffer or put another tensor in its place.
        """
        kept = [(holder, name, holder[name]) for holder, name in self.places]
        copies = [
            (buffer, buffer.clone()) for *_, buffer in kept if buffer is not None and id(buffer) not in self.views
        ]

        def put_back() -> None:
            for holder, name, buffer in kept:
                holder[name] = buffer
            for buffer, copy in copies:
                buffer.copy_(copy)

        return put_back

    def copies(self) -> Flat:
        return tuple(flat.clone() for flat in self.flat)

    def load(self, flat: Flat) -> None:
        """Copies a result of `copies`, or an average, into the model."""
        for target, origin in zip(self.flat, flat, strict=True):
            target.copy_(origin)

    @contextmanager
    def holding(self, flat: Flat) -> Iterator[None]:
        """A context in which the model holds the weights `flat`; afterwards its own return, to the bit."""
        if flat is self.flat:
            yield
            return
        kept = self.copies()
        try:
            self.load(flat)
            yield
        finally:
            self.load(kept)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """One float32 tensor with the contents of `tensors`, each of which becomes a view of its part.

    Every part starts at a multiple of `ALIGNMENT` elements, with zeros between: the compiler copies what it finds less
    aligned at every call, and kernels over the whole load 16 bytes at a time.
    """
    offsets = list(accumulate((-(-tensor.numel() // ALIGNMENT) * ALIGNMENT for tensor in tensors), initial=0))
    flat = torch.zeros(offsets[-1], dtype=torch.float32, device=tensors[0].device if tensors else None)
    for tensor, offset in zip(tensors, offsets, strict=False):
        dense = torch.empty_like(tensor, memory_format=torch.preserve_format)
        view = flat.as_strided(dense.size(), dense.stride(), offset)
        view.copy_(tensor.detach())
        tensor.data = view
    return flat


def decay_table(decays: Sequence[float], steps: int) -> Tensor:
    """The decays of each step, float32 (steps, decays): `min(decay, (1 + step) / (10 + step))`.

    The warm-up, which lets the start be forgotten soon, is that of TensorFlow's
    `ExponentialMovingAverage(num_updates=...)`.
    """
    step = torch.arange(steps, dtype=torch.float64)[:, None]
    return torch.minimum((1 + step) / (10 + step), torch.tensor(decays, dtype=torch.float64)).float()


class Averages:
    """The averages of a run by name: `ema-0.999` for a decay, `swa` for the mean over epochs.

    Raises:
        ConfigError: SWA starts after the last epoch.
    """

    def __init__(self, buckets: Buckets, config: AverageConfig, steps_per_epoch: int, epochs: int) -> None:
        self.buckets, device = buckets, buckets.flat[0].device
        self.steps_per_epoch, total = steps_per_epoch, steps_per_epoch * epochs
        count = len(config.decays)
        self.ema = tuple(flat.repeat(count, 1) for flat in buckets.flat)
        self.decays = decay_table(config.decays, total).to(device)
        """The decays of each step, float32 (steps, averages)."""
        self.flat = {
            average_name(decay): tuple(average[i] for average in self.ema) for i, decay in enumerate(config.decays)
        }
        """The averaged weights, in the form of `Buckets.flat`."""
        self.swa_start = None
        if config.swa_start is not None:
            self.swa_start = Duration.parse(config.swa_start).steps(steps_per_epoch, total)
            if self.swa_start > total - steps_per_epoch:
                raise ConfigError(
                    f"swa_start {config.swa_start} leaves no epoch to average; start before the last of the {epochs} "
                    "epochs."
                )
            self.flat[SWA] = buckets.copies()
            averaged = torch.arange(epochs, dtype=torch.float64)
            self.swa_decays = (averaged / (averaged + 1)).float().to(device)
            """Decays by the number of epochs that the mean is of already, float32 (epochs,)."""

    def update(self, decays: Tensor) -> None:
        """Updates the exponential averages after a step, given its row of `decays`."""
        for average, source in zip(self.ema, self.buckets.flat, strict=True):
            ema_update_(average, source, decays)

    def end_epoch(self, epoch: int) -> None:
        """Adds the weights after `epoch` epochs to the mean over epochs, once that has started.

        Source: Izmailov et al. 2018, arXiv:1803.05407. The mean of batch norm statistics fits no network; see
        `estimate_statistics`.
        """
        if self.swa_start is None or epoch * self.steps_per_epoch <= self.swa_start:
            return
        averaged = epoch - 1 - self.swa_start // self.steps_per_epoch
        for average, source in zip(self.flat[SWA], self.buckets.flat, strict=True):
            if averaged:
                ema_update_(average, source, self.swa_decays[averaged])
            else:
                average.copy_(source)

    def estimate_statistics(
        self, model: nn.Module, forward: Callable[[Tensor], object], batches: Iterable[Tensor]
    ) -> None:
        """Measures batch norm statistics for SWA's weights: `forward` puts each of `batches` through `model`."""
        with self.buckets.holding(self.flat[SWA]):
            estimate_statistics(model, forward, batches)
            self.flat[SWA][1].copy_(self.buckets.flat[1])


@torch.no_grad()
def estimate_statistics(model: nn.Module, forward: Callable[[Tensor], object], batches: Iterable[Tensor]) -> None:
    """Sets the running statistics of every batch norm to their mean over `batches`.

    As `torch.optim.swa_utils.update_bn`.

    The model must be in training mode, and stays so.
    """
    norms = {
        module: module.momentum for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    try:
        for number, batch in enumerate(batches, start=1):
            for module in norms:
                module.momentum = 1 / number
            forward(batch)
    finally:
        for module, momentum in norms.items():
            module.momentum = momentum
