"""From an `ImageSet` to batches: permute, cut into chunks, augment a chunk while the one before it is used."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcifar.augment import BACKENDS, build_policy, normalization
from fastcifar.augment.normalize import Normalization
from fastcifar.augment.policy import Policy
from fastcifar.augment.random import Key, permutation
from fastcifar.data.image_set import ImageSet
from fastcifar.errors import ConfigError, FastcifarError, unknown
from fastcifar.registry import load

CHUNK_SIZE = {"cpu": 1024, "cuda": 8192}
"""Images augmented at once. On a CPU a chunk should stay in the caches; on a GPU it should outweigh DALI's cost a call."""


class Loader:
    """Augmented batches of a data set that lives on the device; iterate over it for one epoch after another.

    What a sample looks like depends on (seed, epoch, its index in the data set) alone: not on the batch size, the chunks or the backend.

    Args:
        dataset: the images, or anything of the form of `ImageSet`.
        policy: augmentation, by name or as a `Policy`.
        backend: "torch", "dali", or "auto": DALI on a GPU where it is installed, torch elsewhere (on a CPU it is the faster one).
        batch_size: images a batch.
        seed: from 0 up to 2**32 - 1.
        device: where the data set is moved and the batches come out.
        dtype: of the images; torch.uint8 leaves them unnormalised, for a network that normalises them itself.
        normalize: preset of mean and deviation: "true" (the data set's own), "kuangliu", "half" or "none".
        shuffle: a new order each epoch, else the data set's.
        drop_last: leave out the last batch where it is not full.
        chunk_size: images augmented at once; a suitable one by default.

    Yields:
        images of `dtype`, (B, 3, H, W) in channels_last, and labels, int64 (B,).

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
        device: str | torch.device = "cuda",
        dtype: torch.dtype = torch.float32,
        *,
        normalize: str = "true",
        shuffle: bool = True,
        drop_last: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        check(len(dataset), batch_size, seed, chunk_size, self.device)
        self.dataset = dataset.to(self.device)
        self.policy = resolve_policy(policy)
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, shuffle, drop_last
        self.backend = resolve_backend(backend, self.device)
        target = min(chunk_size or CHUNK_SIZE[self.device.type], len(dataset))
        self.chunk_size = max(1, target // batch_size) * batch_size
        self.normalization = Normalization(*normalization(normalize, dataset))
        height, width = dataset.images.shape[1:3]
        applier = load(BACKENDS[self.backend if self.policy.changes_images else "torch"])
        self.applier = applier((height, width), self.chunk_size, dtype, self.normalization, self.device)
        self.epoch = 0
        self.reader: object | None = None
        """Who has a chunk under way."""

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.dataset) // self.batch_size if self.drop_last else -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The next epoch."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self.batches(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `epoch` from batch `start` on, whatever was iterated before."""
        if start >= len(self):
            return
        key = Key(self.seed, epoch)
        order = permutation(key, len(self.dataset)) if self.shuffle else torch.arange(len(self.dataset))
        first, *others = order[start * self.batch_size : len(self) * self.batch_size].split(self.chunk_size)
        if self.reader is not None:
            self.applier.collect()
        self.reader = reader = object()
        labels = self.submit(key, first)
        for following in (*others, None):
            if self.reader is not reader:
                raise FastcifarError("this epoch was left for another of the same Loader; make a second Loader to read two at once.")
            images, ready = self.applier.collect(), labels
            self.reader = None if following is None else reader
            if following is not None:
                labels = self.submit(key, following)
            yield from zip(images.split(self.batch_size), ready.split(self.batch_size), strict=True)

    def submit(self, key: Key, index: Tensor) -> Tensor:
        """Starts on the samples at `index`, int64 (N,) on the CPU; gives their labels, int64 (N,)."""
        on_device = index.to(self.device, non_blocking=True)
        self.applier.submit(self.dataset.images.index_select(0, on_device), self.policy.sample(key, index))
        return self.dataset.labels.index_select(0, on_device)


def check(count: int, batch_size: int, seed: int, chunk_size: int | None, device: torch.device) -> None:
    """Raises ConfigError where a `Loader` cannot be built."""
    if not 1 <= batch_size <= count:
        raise ConfigError(f"batch size {batch_size} does not suit {count} images; give a size from 1 to {count}.")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed {seed} is out of range; give one from 0 to {2**32 - 1}.")
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(f"chunk size {chunk_size} is out of range; give at least 1.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device was found; pass device='cpu', or install the driver that your GPU needs.")
    if device.type not in CHUNK_SIZE:
        raise ConfigError(f"device {device.type!r} is not supported; choose one of {', '.join(CHUNK_SIZE)}.")


def resolve_policy(given: str | Policy) -> Policy:
    """A policy by its name, or as it is."""
    return build_policy(given) if isinstance(given, str) else given


def resolve_backend(name: str, device: torch.device) -> str:
    """The backend that `name` stands for on `device`."""
    if name == "auto":
        return "dali" if device.type == "cuda" and dali_installed() else "torch"
    if name not in BACKENDS:
        raise ConfigError(unknown("loader", name, ("auto", *BACKENDS)))
    return name


def dali_installed() -> bool:
    """Whether NVIDIA DALI can be found; it is not imported, which would take half a second."""
    from importlib.util import find_spec

    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
