"""What a run holds in memory, and how it is laid out to stay within a card's; torch is imported once something is counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastcifar.config import RunConfig
from fastcifar.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONTEXT_BYTES = 600 * 2**20
"""Taken for what CUDA, cuBLAS and cuDNN keep on a card besides tensors; it differs by some hundred MiB between cards and versions."""
RESERVE = 10
"""One part in so many stays free, for workspaces of convolutions and what the allocator cannot use."""
CHUNK_VALUE_BYTES = 16
"""Of each value of a chunk under augmentation: bytes of this chunk and the next, and float32 copies and indices in between."""
CHUNK_SHARE, EVALUATION_SHARE = 16, 8
"""A chunk, and a slice of an evaluation, each take at most one part in so many."""
FIRST_CHUNK, FIRST_EVALUATION = 8192, 2000
"""Images in them, to be halved until they fit."""
MAPS_IN_FLIGHT = 4
"""Largest maps that exist at once besides what is kept for the backward pass: inputs, outputs, and the gradients of both."""


@dataclass(frozen=True)
class DataSize:
    """What the cost of a run depends on."""

    train: int
    """Images, those for validation included."""
    test: int
    classes: int = 10
    image_size: int = 32

    @property
    def bytes(self) -> int:
        """Of all images, uint8 RGB, and their labels, int64."""
        return (self.train + self.test) * (3 * self.image_size**2 + 8)


@dataclass(frozen=True)
class MemoryPlan:
    """How a run is laid out to stay within `limit`."""

    limit: int
    """Bytes, with all that a process takes there."""
    batch_size: int
    chunk_size: int
    """Images augmented at once."""
    micro_batch: int
    """Images a pass; where that is the whole batch, it is not split."""
    evaluation_batch: int
    """Images evaluated at once."""
    parts: dict[str, int]
    """Bytes at the peak, by what they hold; their sum is at most `limit`."""

    @property
    def passes(self) -> int:
        """Passes a batch."""
        return math.ceil(self.batch_size / self.micro_batch)

    def __str__(self) -> str:
        """One line on the choices."""
        whole = f"batches of {self.batch_size} whole"
        split = f"batches of {self.batch_size} in {self.passes} passes of {self.micro_batch}, with batch norm statistics of each pass"
        return (
            f"Within {size(self.limit)}: {whole if self.passes == 1 else split}; {self.chunk_size:,} images augmented and "
            f"{self.evaluation_batch:,} evaluated at once; an estimated {size(sum(self.parts.values()))} in use."
        )


@dataclass(frozen=True)
class Footprint:
    """What a network's training takes, whatever the memory and the size of a batch."""

    held: dict[str, int]
    """Bytes from the first step to the last, by what they hold."""
    augmented: int
    """Bytes of an image under augmentation."""
    evaluated: int
    """Bytes of an image in an evaluation, and of what comes and goes for it in a step."""
    trained: int
    """Bytes of an image in a step."""


def footprint(config: RunConfig, data: DataSize, value_bytes: int = 2) -> Footprint:
    """Counts what `config` takes, activations having `value_bytes` bytes a value: 2 in bfloat16 and float16, 4 in float32.

    What a network keeps is PyTorch's own count without a compiler (`models.count`), which compiling should not raise. Raises as
    `build_model`.
    """
    import torch

    from fastcifar.models import build_model
    from fastcifar.models.count import count_network

    options = {"classes": data.classes, "image_size": data.image_size, **config.model.options}
    count = count_network(config.model.arch, **options)
    with torch.random.fork_rng(devices=[]):
        held = held_bytes(config, data, build_model(config.model.arch, **options))
    held["weights in low precision"] = value_bytes * count.parameters if value_bytes < 4 else 0
    in_flight = MAPS_IN_FLIGHT * value_bytes * max(math.prod(layer.output) for layer in count.layers)
    kept = count.activation_bytes * value_bytes // 2
    return Footprint(held, 3 * data.image_size**2 * CHUNK_VALUE_BYTES, in_flight, kept + in_flight)


def plan_memory(config: RunConfig, data: DataSize, limit: int, value_bytes: int = 2) -> MemoryPlan:
    """Lays out a run within `limit` bytes. Raises as `footprint` and `lay_out`."""
    return lay_out(config, footprint(config, data, value_bytes), limit)


def lay_out(config: RunConfig, taken: Footprint, limit: int) -> MemoryPlan:
    """Lays out a run within `limit` bytes; a chunk size and a micro batch that `config` names are kept.

    A batch is split into equal parts only, so that a step has one shape.

    Raises:
        ConfigError: it does not fit with one image a pass, or with the micro batch asked for.
    """
    batch_size = config.batch_size
    chunk_size = config.data.chunk_size or halved(FIRST_CHUNK, limit // CHUNK_SHARE // taken.augmented)
    evaluation_batch = halved(FIRST_EVALUATION, limit // EVALUATION_SHARE // taken.evaluated)
    parts = {
        **taken.held,
        "images under augmentation": max(chunk_size, batch_size) * taken.augmented,
        "evaluation": evaluation_batch * taken.evaluated,
        "CUDA and its libraries": CONTEXT_BYTES,
        "reserve": limit // RESERVE,
    }
    asked = config.engine.micro_batch
    candidates = [min(asked, batch_size)] if asked else divisors(batch_size)
    room = limit - sum(parts.values())
    micro_batch = next((images for images in candidates if images * taken.trained <= room), None)
    if micro_batch is None:
        needed = sum(parts.values()) + candidates[-1] * taken.trained
        raise ConfigError(
            f"{config.model.arch} with {candidates[-1]} images a pass needs about {size(needed)}, and there are {size(limit)}; "
            "choose a smaller network, --micro-batch or --chunk-size, keep fewer averages, or give more memory."
        )
    return MemoryPlan(limit, batch_size, chunk_size, micro_batch, evaluation_batch, parts | {"activations": micro_batch * taken.trained})


def fit_to_memory(config: RunConfig, data: DataSize, device: torch.device, value_bytes: int = 2) -> tuple[RunConfig, MemoryPlan | None]:
    """`config` with the chunk size and the micro batch that suit the memory limit, or else what is free on the card, and the plan.

    On a CPU without a limit there is no plan, and what is left open is what suits any CPU. Raises as `plan_memory`.
    """
    import torch

    from fastcifar.data.loader import CHUNK_SIZE

    limit = config.engine.memory_limit_bytes
    if limit is None and device.type == "cuda":
        limit = torch.cuda.mem_get_info(device)[0] + CONTEXT_BYTES  # asking has made the context, which is free no more
    if device.type == "cpu" and config.data.chunk_size is None:
        config = replace(config, data=replace(config.data, chunk_size=CHUNK_SIZE["cpu"]))
    if limit is None:
        return replace(config, engine=replace(config.engine, micro_batch=config.engine.micro_batch or config.batch_size)), None
    plan = plan_memory(config, data, limit, value_bytes)
    data_config = replace(config.data, chunk_size=plan.chunk_size)
    return replace(config, data=data_config, engine=replace(config.engine, micro_batch=plan.micro_batch)), plan


def limit_memory(limit: int, device: torch.device) -> None:
    """Has tensors on a GPU fail beyond what a card of `limit` bytes would hold; on a CPU nothing is enforced.

    Raises:
        ConfigError: the card has less.
    """
    if device.type != "cuda":
        return
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    if limit > total:
        raise ConfigError(f"the memory limit of {size(limit)} exceeds the card's {size(total)}; lower --memory-limit, or leave it out.")
    torch.cuda.set_per_process_memory_fraction(max(limit - CONTEXT_BYTES, 0) / total, device)


def halved(first: int, most: int) -> int:
    """`first`, halved until it is at most `most`; at least 1."""
    while first > max(most, 1):
        first //= 2
    return first


def divisors(number: int) -> list[int]:
    """From the number itself down to 1."""

    def pairs() -> Iterator[int]:
        for small in range(1, math.isqrt(number) + 1):
            if number % small == 0:
                yield from (small, number // small)

    return sorted(set(pairs()), reverse=True)


def held_bytes(config: RunConfig, data: DataSize, model: nn.Module) -> dict[str, int]:
    """Bytes that a run holds from its first step to its last, by what they hold."""
    from fastcifar.optim.optimizers import build_optimizer

    optimizer = build_optimizer(model, config.optim)
    parameters, buffers = nbytes(model.parameters()), nbytes(model.buffers())
    averages = len(config.average.decays) + (config.average.swa_start is not None)
    return {
        "data set": data.bytes,
        "weights": parameters + buffers,
        "gradients": parameters,
        "optimiser": sum(nbytes(state.values()) for state in optimizer.state.values()),
        "averages": averages * (parameters + buffers),
        "best weights": (1 + averages) * (parameters + buffers) if config.data.val_split else 0,
        "weights that SAM returns to": 0 if config.optim.sharpness == "none" else parameters + buffers,
    }


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def size(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
