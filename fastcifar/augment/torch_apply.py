"""The appliers that are one function over a data set: the reference in plain torch, and the Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcifar.augment.automatic import GEOMETRIC, Operation
from fastcifar.augment.colour import apply_operation
from fastcifar.augment.geometry import Resampling
from fastcifar.augment.normalize import Normalization
from fastcifar.augment.policy import Policy
from fastcifar.augment.random import Key
from fastcifar.augment.sampling import Params, Slot, sample
from fastcifar.checks import given
from fastcifar.kernels.augment import augment, augment_reference
from fastcifar.kernels.transfer import upload

if TYPE_CHECKING:
    from fastcifar.data.image_set import ImageSet

Colour = tuple[int, int, int]
BLACK: Colour = (0, 0, 0)


class TorchApplier:
    """Applies `Params` with torch operators on the current stream.

    Args:
        dataset: the images, on the device.
        policy: only its fill and interpolation are read; all else comes with the parameters.
        normalization: applied unless `dtype` is uint8.
        dtype: of the output images.
        chunk_size: most samples in one call.
    """

    function: Callable[..., Tensor] = staticmethod(augment_reference)
    """`kernels.augment.augment` or its reference: gathers, warps, greys, shifts, erases and normalises."""
    largest_chunk = 2**31 - 1
    """The largest `chunk_size` allowed."""

    def __init__(
        self, dataset: ImageSet, policy: Policy, normalization: Normalization, dtype: torch.dtype, chunk_size: int
    ) -> None:
        self.images, self.dtype = dataset.images, dtype
        self.resampling = resampling(policy, dataset.mean)
        self.erase_colour = BLACK if policy.erase and policy.erase.inside else as_bytes(dataset.mean)
        self.axes = colour_axes(self.images) if policy.intensity else None
        self.scale, self.offset = normalization.affine(self.images.device)
        self.pending: Tensor | None = None

    def submit(self, index: Tensor, params: Params) -> None:
        self.pending = self.apply(index, params).permute(0, 3, 1, 2)

    def collect(self) -> Tensor:
        result, self.pending = given(self.pending), None
        return result

    def apply(self, index: Tensor, params: Params) -> Tensor:
        """Augments to (N, H, W, 3) of `dtype` in one pass over memory, or two around an automatic policy."""
        if not params.slots:
            return self.one_pass(self.images, index, params.warp, self.resampling, params)
        images = self.one_pass(self.images, index, params.warp, self.resampling, None)
        for slot in params.slots:
            self.apply_slot(images, slot)
        return self.one_pass(images, None, None, self.resampling, params)

    def one_pass(
        self, images: Tensor, index: Tensor | None, warp: Tensor | None, how: Resampling, ending: Params | None
    ) -> Tensor:
        """Gathers and warps, then does all from greyscale to normalisation if `ending` is given: (N, H, W, 3).

        Without `ending` the result is bytes.
        """
        drawn, dtype = (None, None, None), torch.uint8
        if ending is not None:
            drawn, dtype = (ending.grey, self.shift(ending), ending.boxes), self.dtype
        normalizing = (None, None) if dtype == torch.uint8 else (self.scale, self.offset)
        return self.function(
            images, index, warp, *drawn, *normalizing, dtype, how.fill, how.colour, how.bilinear, self.erase_colour
        )

    def shift(self, params: Params) -> Tensor | None:
        """What is added to each channel of each sample, in grey levels: int32 (N, 3)."""
        if params.intensity is None:
            return None
        return torch.round(params.intensity @ given(self.axes)).int()

    def apply_slot(self, images: Tensor, slot: Slot) -> None:
        """Carries out one turn of an automatic policy in place, a group of equal operations at a time."""
        for group in grouped(slot, images.device).values():
            images.index_copy_(0, group.place, self.apply_group(images, group, slot.fill))

    def apply_group(self, images: Tensor, group: Group, fill: int) -> Tensor:
        """Returns the changed images of a group: uint8 (G, H, W, 3)."""
        if group.operation in GEOMETRIC:
            return self.one_pass(images, group.place, group.warp, Resampling(colour=(fill, fill, fill)), None)
        return apply_operation(images.index_select(0, group.place), group.operation, group.value)


class TritonApplier(TorchApplier):
    """Augments as `TorchApplier` does, with the Triton kernel on a GPU; elsewhere its reference runs."""

    function = staticmethod(augment)


@dataclass(frozen=True, eq=False)
class Group:
    """The G samples of a slot that share an operation."""

    operation: Operation
    """The operation; ROTATE stands for all geometric ones, since their maps differ."""
    place: Tensor
    """int64 (G,) on the device: the samples' rows in the chunk."""
    value: Tensor
    """float64 (G,) on the device."""
    warp: Tensor
    """int32 (G, 6) on the CPU."""


def grouped(slot: Slot, device: torch.device) -> dict[Operation, Group]:
    """The groups of a slot, without unchanged samples. Sizes come from CPU tensors, so nothing waits for the device."""
    operations = torch.where(
        torch.isin(slot.operation, torch.tensor(sorted(GEOMETRIC))), int(Operation.ROTATE), slot.operation
    )
    numbers, sizes = operations.unique(return_counts=True)
    order = operations.argsort(stable=True)
    rows = (upload(order, device), upload(slot.value[order], device), slot.warp[order])
    parts = zip(*(tensor.split(sizes.tolist()) for tensor in rows), strict=True)
    groups = (Group(Operation(number), *part) for number, part in zip(numbers.tolist(), parts, strict=True))
    return {group.operation: group for group in groups if group.operation != Operation.IDENTITY}


def colour_axes(images: Tensor) -> Tensor:
    """The principal axes of the colours of uint8 (N, H, W, 3), in rows, float64 (3, 3) on the CPU, in grey levels.

    Each eigenvector of the covariance of red, green and blue, as fractions of 255, is as long as its eigenvalue:
    Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks", section 4.1. Sums of
    products of bytes are whole numbers, exact in float64 on every device; the largest part of an axis is positive.
    """
    total, products, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64), 0
    for part in images.view(-1, 3).split(1 << 22):
        pixels = part.double()
        total += pixels.sum(0).cpu()
        products += (pixels.T @ pixels).cpu()
        count += len(part)
    mean = total / count
    values, vectors = torch.linalg.eigh((products / count - mean.outer(mean)) / 255**2)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return 255 * (vectors * largest.sign() * values).T


def resampling(policy: Policy, mean: tuple[float, float, float]) -> Resampling:
    """How a policy's warp reads pixels, given the data set's mean colour as fractions of 255."""
    fill = policy.fill if policy.fill in ("reflect", "clamp") else "constant"
    return Resampling(policy.interpolation == "bilinear", fill, as_bytes(mean) if policy.fill == "mean" else BLACK)


def as_bytes(colour: tuple[float, float, float]) -> Colour:
    red, green, blue = (round(255 * part) for part in colour)
    return red, green, blue


def augmented(policy: Policy, dataset: ImageSet, key: Key, index: Tensor) -> Tensor:
    """The samples at `index`, int64 (N,), as training sees them, unmixed, in the epoch `key`: uint8 (N, H, W, 3)."""
    normalization = Normalization(dataset.mean, dataset.std)
    applier = TorchApplier(dataset, policy, normalization, torch.uint8, len(index))
    return applier.apply(index, sample(policy, key, index, dataset.size, len(dataset)))
