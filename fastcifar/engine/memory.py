"""Estimates a run's memory and lays the run out to fit; torch is imported only when something is counted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastcifar.config import EngineConfig, OptimConfig, RunConfig
from fastcifar.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from fastcifar.models.count import NetworkCount

CONTEXT_BYTES = 600 * 2**20
"""Assumed for CUDA, cuBLAS and cuDNN on a card, besides tensors; cards and versions differ by some hundred MiB."""
PROCESS_BYTES, COMPILER_BYTES = 850 * 2**20, 200 * 2**20
"""Assumed for Python and its libraries in main memory, and for the compiler in that process.

On Linux with torch 2.15 built for CUDA 13, 686 MiB were resident after the imports and 794 MiB at the peak of a run of
a network of 470 parameters; 45 MiB came with the compiler's imports and another 77 MiB with a small graph. A torch
without CUDA takes less.
"""
HEAP = 1.5
"""Ratio of a step's resident memory to its tensors, since the C library keeps what is freed, in pieces.

Uncompiled on one thread it was 1.2 (`resnet20_v2` in float32, batches of 512) to 1.5 (`resnet` in float32, batches of
128). The whole plan was 1.03 (`resnet`, batches of 8) to 1.33 times the measured peak of eight runs, two of them
compiled.
"""
WEIGHT_BYTES = 4
RESERVE = 10
"""One part in `RESERVE` stays free, for convolution workspaces and what the allocator cannot use."""
CHUNK_VALUE_BYTES = 16
"""Bytes that a value takes while its chunk is augmented: two chunks, and float32 copies and indices."""
CHUNK_SHARE, EVALUATION_SHARE = 16, 8
"""A chunk, and a slice of an evaluation where memory is short, each take at most one part in this many."""
MAPS_IN_FLIGHT = 4
"""Largest maps alive at once besides those kept for the backward pass: inputs, outputs and their gradients."""


@dataclass(frozen=True)
class DataSize:
    """The size of a data set; `train` includes the validation images."""

    train: int
    test: int
    classes: int = 10
    image_size: int = 32

    @property
    def bytes(self) -> int:
        """Bytes of all images (uint8 RGB) and labels (int64)."""
        return (self.train + self.test) * (3 * self.image_size**2 + 8)


@dataclass(frozen=True)
class MemoryPlan:
    limit: int
    """Bytes for all that the process takes there."""
    batch_size: int
    chunk_size: int
    """Images augmented at once."""
    micro_batch: int
    """Images in one pass; the batch size where the batch is not split."""
    evaluation_batch: int
    parts: dict[str, int]
    """Bytes at the peak, by what they hold."""

    @property
    def needed(self) -> int:
        """Bytes at the peak, of the whole process on a CPU; together with the reserve at most `limit`."""
        return sum(self.parts.values())

    @property
    def passes(self) -> int:
        return math.ceil(self.batch_size / self.micro_batch)


@dataclass(frozen=True)
class Footprint:
    """Bytes that training a network takes, whatever the memory and the batch size."""

    device: str
    """cpu or cuda."""
    held: dict[str, int]
    """Bytes held from the first step to the last, by what they hold."""
    augmented: int
    """Bytes for an image under augmentation."""
    evaluated: int
    """Bytes for an image in an evaluation, and for the temporary values of an image in a step."""
    trained: int
    """Bytes for an image in a step."""


def footprint(
    config: RunConfig, data: DataSize, device: torch.device, value_bytes: int = 2, count: NetworkCount | None = None
) -> Footprint:
    """Counts the memory that `config` takes on `device`; nothing is allocated except for third-party networks.

    An activation has `value_bytes` bytes: 2 in bfloat16 and float16, 4 in float32. What a network keeps is PyTorch's
    own `count` without a compiler (`models.count`), which compiling should not raise. Raises ConfigError as
    `build_model` does, or where the run would keep no snapshots, or too many.
    """
    from fastcifar.models.count import count_network
    from fastcifar.optim.schedules import cycle_ends

    if count is None:
        options = {"classes": data.classes, "image_size": data.image_size, **config.model.options}
        count = count_network(config.model.arch, **options)
    held, heap = held_bytes(config, data, count), 1.0
    held["weights in low precision"] = value_bytes * count.parameters if value_bytes < WEIGHT_BYTES else 0
    if device.type == "cpu":
        steps_per_epoch = max(1, (data.train - config.data.val_split) // config.batch_size)
        cycles = cycle_ends(config.schedule, steps_per_epoch, config.epochs) if config.schedule.snapshots else ()
        held["images before the split"] = data.train * 3 * data.image_size**2 if config.data.val_split else 0
        held["snapshots"] = len(cycles) * held["weights"]
        held["Python and its libraries"] = PROCESS_BYTES + (0 if config.engine.compile == "off" else COMPILER_BYTES)
        # All weights are copied, then those of one file into its order and its bytes.
        held["copies for a checkpoint"] = 3 * held["weights"] + held["averages"] + held["best weights"]
        heap = HEAP
    else:
        held["CUDA and its libraries"] = CONTEXT_BYTES
    in_flight = MAPS_IN_FLIGHT * value_bytes * max(math.prod(layer.output) for layer in count.layers)
    kept = count.activation_bytes * value_bytes // 2
    augmented = 3 * data.image_size**2 * CHUNK_VALUE_BYTES
    return Footprint(device.type, held, augmented, int(heap * in_flight), int(heap * (kept + in_flight)))


def held_bytes(config: RunConfig, data: DataSize, count: NetworkCount) -> dict[str, int]:
    """Returns the bytes that a run holds from its first step to its last on any device, by what they hold."""
    parameters = WEIGHT_BYTES * count.parameters
    weights = parameters + count.buffer_bytes
    averages = len(config.average.decays) + (config.average.swa_start is not None)
    return {
        "data set": data.bytes,
        "weights": weights,
        "gradients": parameters,
        "optimiser": parameters * values_per_weight(config.optim),
        "averages": averages * weights,
        "best weights": (1 + averages) * weights if config.data.val_split else 0,
        "weights that SAM returns to": 0 if config.optim.sharpness == "none" else weights,
    }


def values_per_weight(optim: OptimConfig) -> int:
    """Counts the values that an optimizer keeps for each weight, measured on a small matrix."""
    import torch

    from fastcifar.optim.optimizers import build_optimizer

    matrix = torch.nn.Linear(64, 64, bias=False, device="meta").to_empty(device="cpu")
    states = build_optimizer(matrix, optim).state.values()
    return sum(tensor.numel() for state in states for tensor in state.values()) // matrix.weight.numel()


def lay_out(config: RunConfig, taken: Footprint, limit: int) -> MemoryPlan:
    """Lays out a run within `limit` bytes; a chunk size and a micro batch that `config` names are kept.

    A batch is split into equal parts only, so that a step has one shape. Raises ConfigError where the run does not fit
    with one image in a pass, or with the micro batch asked for.
    """
    from fastcifar.data.loader import CHUNK_SIZE
    from fastcifar.engine.evaluate import BATCH_SIZE

    batch_size, asked = config.batch_size, config.engine.micro_batch
    chunk_size = config.data.chunk_size or halved(CHUNK_SIZE[taken.device], limit // CHUNK_SHARE // taken.augmented)
    parts = {**taken.held, "images under augmentation": max(chunk_size, batch_size) * taken.augmented}
    room = limit - limit // RESERVE - sum(parts.values())
    candidates = [min(asked, batch_size)] if asked else divisors(batch_size)
    evaluation_room = limit // EVALUATION_SHARE
    if taken.device == "cpu":  # whose runs end in the same bytes wherever the whole plan fits
        evaluation_room = max(evaluation_room, room - candidates[0] * taken.trained)
    evaluation_batch = halved(BATCH_SIZE[taken.device], evaluation_room // taken.evaluated)
    parts["evaluation"] = evaluation_batch * taken.evaluated
    room -= parts["evaluation"]
    micro_batch = next((images for images in candidates if images * taken.trained <= room), None)
    if micro_batch is None:
        fewest = candidates[-1]
        needed = (sum(parts.values()) + fewest * taken.trained) * RESERVE // (RESERVE - 1)
        raise ConfigError(
            f"{config.model.arch} with {fewest} image{'s' * (fewest > 1)} a pass needs about {size(needed)}, and "
            f"there are {size(limit)}; choose a smaller network, --micro-batch or --chunk-size, keep fewer averages, "
            "or give more memory."
        )
    parts["activations"] = micro_batch * taken.trained
    return MemoryPlan(limit, batch_size, chunk_size, micro_batch, evaluation_batch, parts)


def fit_to_memory(config: RunConfig, taken: Footprint, limit: int | None) -> tuple[RunConfig, MemoryPlan | None]:
    """Sets the chunk size and micro batch in `config` to suit `limit` bytes, and returns it with the plan.

    Without a limit there is no plan, and open choices get their defaults. Raises as `lay_out` does.
    """
    from fastcifar.data.loader import CHUNK_SIZE

    plan = None if limit is None else lay_out(config, taken, limit)
    chunk_size = config.data.chunk_size or (plan.chunk_size if plan else CHUNK_SIZE[taken.device])
    micro_batch = config.engine.micro_batch or (plan.micro_batch if plan else config.batch_size)
    data, engine = replace(config.data, chunk_size=chunk_size), replace(config.engine, micro_batch=micro_batch)
    return replace(config, data=data, engine=engine), plan


def check_passes(arch: str, batch_size: int, micro_batch: int, count: NetworkCount) -> None:
    """Raises ConfigError where a pass has one image and a batch norm maps of one pixel, which have no variance."""
    pointwise = [layer for layer in count.layers if "BatchNorm" in layer.kind and math.prod(layer.output[1:]) == 1]
    if pointwise and 1 in (batch_size, micro_batch, batch_size % micro_batch):
        raise ConfigError(
            f"{arch}'s {pointwise[0].name} normalises maps of one pixel, whose variance over one image is not defined; "
            "choose a --batch-size, or a --micro-batch, that leaves no image by itself."
        )


def memory_limit(engine: EngineConfig, device: torch.device) -> int | None:
    """Returns the bytes that this process may take: the limit given, else its own plus the free; None if unknown."""
    from fastcifar.device import free_memory, own_memory

    if engine.memory_limit_bytes:
        return engine.memory_limit_bytes
    free = free_memory(device)
    return None if free is None else free + (CONTEXT_BYTES if device.type == "cuda" else own_memory())


def limit_memory(limit: int, device: torch.device) -> None:
    """Makes tensors on a GPU fail beyond what a card of `limit` bytes holds. Raises ConfigError where it has less."""
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    if limit > total:
        raise ConfigError(
            f"the memory limit of {size(limit)} exceeds the card's {size(total)}; lower --memory-limit, or leave it "
            "out."
        )
    torch.cuda.set_per_process_memory_fraction(max(limit - CONTEXT_BYTES, 0) / total, device)


def halved(first: int, most: int) -> int:
    """Halves `first` until it is at most `most`; returns at least 1."""
    while first > max(most, 1):
        first //= 2
    return first


def divisors(number: int) -> list[int]:
    """Lists the divisors, from the number itself down to 1."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)}, reverse=True)


def passes_in_words(plan: MemoryPlan) -> str:
    whole = f"batches of {plan.batch_size}"
    split = f"in {plan.passes} passes of {plan.micro_batch}, with batch norm statistics of each pass"
    return f"{whole} whole" if plan.passes == 1 else f"{whole} {split}"


def plan_in_words(plan: MemoryPlan) -> str:
    return (
        f"Within {size(plan.limit)}: {passes_in_words(plan)}; {plan.chunk_size:,} images augmented and "
        f"{plan.evaluation_batch:,} evaluated at once; an estimated {size(plan.needed)} in use."
    )


def size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
