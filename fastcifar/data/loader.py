"""Makes batches from an `ImageSet`: orders the samples, and augments each chunk while the one before it is used."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pkgutil import resolve_name

import torch
from torch import Tensor

from fastcifar.augment import BACKENDS, normalization
from fastcifar.augment.mixing import mix_images, mix_labels
from fastcifar.augment.normalize import Normalization
from fastcifar.augment.policy import Policy, parse
from fastcifar.augment.random import Key
from fastcifar.augment.sampling import Mixing, sample, sample_mixing
from fastcifar.data.image_set import ImageSet
from fastcifar.data.order import Order
from fastcifar.errors import ConfigError, FastcifarError, reason, unknown
from fastcifar.kernels.transfer import upload
from fastcifar.output import complain

CHUNK_SIZE = {"cpu": 1024, "cuda": 8192}
"""Images augmented at once. On a CPU a chunk should fit the caches; on a GPU it should outweigh the cost of a call."""
MEMORY_SHARE = 16
"""On a GPU, a chunk takes at most one part in this many of the free memory."""


@dataclass(frozen=True)
class Chunk:
    """A chunk submitted to the applier and not collected yet."""

    labels: Tensor
    mixing: Mixing | None
    begins: int | None
    """The epoch that begins with this chunk, where it was submitted ahead of that epoch."""


class Loader:
    """Augmented batches of a data set that lives on the device; iterate over it for one epoch after another.

    What a sample looks like depends on (seed, epoch, its index in the data set) alone: not on the batch size, the
    chunks, the backend, or on how many processes share the epoch.

    Args:
        dataset: any uint8 NHWC images with labels.
        policy: augmentation, as text (`augment.policy.parse`) or as a `Policy`.
        backend: "torch", "dali", "triton", or "auto", the fastest (see `resolve_backend`).
        batch_size: images a batch.
        seed: from 0 up to 2**32 - 1.
        device: where the data set is moved and the batches come out; "auto" is a GPU where there is one, else the CPU.
        dtype: of the images; torch.uint8 leaves them unnormalised, for a network that normalises them itself.
        normalize: preset of mean and deviation: "true" (the data set's own), "kuangliu", "half" or "none".
        shuffle: a new order each epoch, else the data set's.
        drop_last: leave out the last batch where it is not full.
        chunk_size: images augmented at once; by default as suits the device and its free memory.
        mask: bool (N,): the samples to take; all by default.
        weights: float (N,), none negative: samples are drawn by weight, with replacement, as many an epoch as there are
            to take. One that is drawn twice in an epoch looks the same twice.
        rank, world_size: take every `world_size`-th sample of the common order, from `rank` on; what does not divide
            evenly is left out.

    Yields:
        images of `dtype`, (B, 3, H, W) in channels_last, and labels: int64 (B,), or with mixup and cutmix float32 (B,
        classes).

    Raises:
        ConfigError: a name that is not known, a size out of range, or a device or backend that is not there.
    """

    def __init__(
        self,
        dataset: ImageSet,
        policy: str | Policy = "standard",
        backend: str = "auto",
        batch_size: int = 512,
        seed: int = 0,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
        *,
        normalize: str = "true",
        shuffle: bool = True,
        drop_last: bool = False,
        chunk_size: int | None = None,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.device = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        self.order = Order(
            len(dataset), seed, shuffle=shuffle, mask=mask, weights=weights, rank=rank, world_size=world_size
        )
        check(len(self.order), batch_size, drop_last, chunk_size, self.device)
        self.dataset = dataset.to(self.device)
        self.policy = parse(policy) if isinstance(policy, str) else policy
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self.backend = resolve_backend(backend, self.device)
        applier, for_each = resolve_name(BACKENDS[self.backend]), 2 if self.policy.mix else 1
        most = min(len(self.order), applier.largest_chunk // for_each)
        target = min(chunk_size or default_chunk_size(self.device, self.dataset), most)
        self.chunk_size = max(1, target // batch_size) * batch_size
        self.normalization = Normalization(*normalization(normalize, (dataset.mean, dataset.std)))
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # once, for the data set does not change
            for tensor in (self.dataset.images, self.dataset.labels):
                tensor.record_stream(self.stream)
        with self.aside():
            self.applier = applier(self.dataset, self.policy, self.normalization, dtype, self.chunk_size * for_each)
        self.epoch = 0
        self.iteration = 0
        """The number of iterations begun; only the latest one owns the chunk under way."""
        self.chunk: Chunk | None = None
        """The chunk under way."""

    def __len__(self) -> int:
        return len(self.order) // self.batch_size if self.drop_last else -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over the next epoch."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self.batches(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of `epoch` from batch `start` on, whatever was iterated before."""
        if start >= len(self):
            return
        first, *others = self.chunks(epoch, start)
        if self.chunk is None or start or self.chunk.begins != epoch:
            self.discard()
            self.submit(epoch, first)
        self.iteration = iteration = self.iteration + 1
        for following in (*others, None):
            if self.iteration != iteration:
                raise FastcifarError(
                    "this epoch was left for another of the same Loader; make a second Loader to read two at once."
                )
            images, labels = self.collect()
            if following is not None:
                self.submit(epoch, following)
            elif self.stream is not None:  # a GPU does not wait for the first chunk of the next epoch either
                self.submit(epoch + 1, self.chunks(epoch + 1, 0)[0], begins=epoch + 1)
            yield from zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True)

    def chunks(self, epoch: int, start: int) -> tuple[Tensor, ...]:
        """The samples of `epoch` from batch `start` on, as int64 (N,) on the CPU for each chunk."""
        return self.order.epoch(epoch)[start * self.batch_size : len(self) * self.batch_size].split(self.chunk_size)

    def submit(self, epoch: int, index: Tensor, begins: int | None = None) -> None:
        """Starts augmenting the samples at `index`, int64 (N,) on the CPU, on the loader's own stream if it has one."""
        key, size, taken, mixing = Key(self.seed, epoch), self.dataset.size, self.order.taken, None
        with self.aside(), self.naming_failures():
            if self.policy.mix is not None:
                mixing = sample_mixing(self.policy.mix, key, index, size, len(taken))
                index = torch.cat((index, taken[mixing.partner]))
            self.applier.submit(index, sample(replace(self.policy, mix=None), key, index, size, len(taken)))
            labels = self.dataset.labels.index_select(0, upload(index, self.device))
            self.chunk = Chunk(labels, mixing, begins)

    def discard(self) -> None:
        """Drops the chunk under way, if any."""
        if self.chunk is not None:
            self.chunk = None
            with self.aside():
                self.applier.collect()

    def collect(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the chunk under way, ready for the current stream."""
        chunk, self.chunk = self.chunk, None
        assert chunk is not None, "collect() without submit()"
        with self.aside(), self.naming_failures():
            images, labels = self.applier.collect(), chunk.labels
            if chunk.mixing is not None:
                half = len(labels) // 2
                images = mix_images(images[:half], images[half:], chunk.mixing)
                labels = mix_labels(labels[:half], labels[half:], chunk.mixing, len(self.dataset.classes))
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            images.record_stream(current)
            labels.record_stream(current)
        return images, labels

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Turns errors of DALI into one sentence; torch's errors, which are clearer, pass through."""
        try:
            yield
        except (FastcifarError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            if self.backend != "dali":
                raise
            message = f"DALI failed ({reason(error)}); choose --loader triton, which does the same."
            raise FastcifarError(message) from error

    def aside(self) -> AbstractContextManager:
        """A context with the loader's own stream, if it has one."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


def check(count: int, batch_size: int, drop_last: bool, chunk_size: int | None, device: torch.device) -> None:
    """Raises ConfigError where the arguments of a `Loader` are invalid."""
    if not count:
        raise ConfigError("there are no images to load; give a data set, and a mask, that leave at least one.")
    if batch_size < 1 or (drop_last and batch_size > count):
        raise ConfigError(f"batch size {batch_size} does not suit {count} images; give a size from 1 to {count}.")
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(f"chunk size {chunk_size} is out of range; give at least 1.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device was found; pass device='cpu', or install the driver that your GPU needs.")
    if device.type not in CHUNK_SIZE:
        raise ConfigError(f"device {device.type!r} is not supported; choose one of {', '.join(CHUNK_SIZE)}.")


def default_chunk_size(device: torch.device, dataset: ImageSet) -> int:
    """The default chunk size: on a GPU limited by the free memory, with images counted as float32."""
    most = CHUNK_SIZE[device.type]
    if device.type != "cuda":
        return most
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(most, free // MEMORY_SHARE // (4 * dataset.images[0].numel())))


def resolve_backend(name: str, device: torch.device) -> str:
    """The backend that `name` stands for on `device`. Raises ConfigError where the name is unknown.

    "auto" is DALI on a GPU where it works there, else Triton; on a CPU torch, which is fastest (benchmarks/README.md).
    """
    if name == "auto":
        return "torch" if device.type == "cpu" else "dali" if dali_works(device) else "triton"
    if name not in BACKENDS:
        raise ConfigError(unknown("loader", name, ("auto", *BACKENDS)))
    return name


@functools.cache
def dali_works(device: torch.device) -> bool:
    """Whether NVIDIA DALI can be used on a GPU; prints the reason on stderr once if not."""
    if not dali_installed():
        return False
    from fastcifar.augment.dali_apply import why_unusable

    reason = why_unusable(device)
    if reason is not None:
        complain(f"fastcifar: images are augmented by Triton, since DALI does not work here: {reason}")
    return reason is None


def dali_installed() -> bool:
    """Whether NVIDIA DALI is installed, without importing it, which takes half a second."""
    from importlib.util import find_spec

    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
