"""The network of a run, built from what its checkpoint says; nothing in the folder is executed unless it is trusted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcifar.augment.normalize import Normalization
from fastcifar.data.sources import IMAGE_SIZE, IMAGE_SIZES
from fastcifar.errors import FastcifarError, unknown
from fastcifar.models import build_model
from fastcifar.runs import checkpoint as checkpoints
from fastcifar.runs.checkpoint import SNAPSHOT, WEIGHTS, Network
from fastcifar.runs.files import reason
from fastcifar.runs.folder import Run

OWN_CODE = re.compile(r"(timm:)?\w[\w.-]*")
"""Architectures that build from installed code alone: no other module is imported, and nothing is fetched."""


@dataclass(frozen=True)
class TrainedNetwork:
    """A network ready to classify, and how to feed it."""

    model: nn.Module
    """In eval mode, channels_last; (N, 3, image_size, image_size), normalised -> logits (N, classes)."""
    normalization: Normalization
    classes: tuple[str, ...]
    """Their names, by label."""
    image_size: int
    """Pixels a side."""
    weights: str
    """Which of the run's weights it holds: "weights", or the name of an average or a snapshot."""
    arch: str


@dataclass(frozen=True)
class StoredNetwork:
    """What a checkpoint holds of a network, on the CPU."""

    path: Path
    """Of the run."""
    network: Network
    weights: dict[str, dict[str, Tensor]]
    """By name: "weights" first, then each average that the run keeps, and each snapshot."""
    validated: dict[str, float]
    """Accuracy of each on the validation split; empty without one."""

    @property
    def snapshots(self) -> list[str]:
        """Names of the weights that were kept at the ends of cycles, in their order."""
        return [name for name in self.weights if SNAPSHOT.fullmatch(name)]

    def choose(self, which: str | None) -> str:
        """The name of the weights `which`; None stands for the best on the validation split.

        Without such a split, it stands for the first average, or where the run keeps none, for the weights themselves. It is no snapshot.

        Raises:
            FastcifarError: the run has no weights of that name.
        """
        if which is None:
            averages_first = sorted(self.weights, key=lambda name: name == WEIGHTS)
            return max((name for name in averages_first if name not in self.snapshots), key=lambda name: self.validated.get(name, 0.0))
        if which not in self.weights:
            raise FastcifarError(f"{self.path}: {unknown('weights', which, self.weights)}")
        return which

    @property
    def image_size(self) -> int:
        """Pixels a side. Raises FastcifarError where it is none that images have."""
        size = self.network["options"].get("image_size", IMAGE_SIZE)
        if type(size) is not int or size not in IMAGE_SIZES:
            raise FastcifarError(f"{self.path}'s network is for images of {size!r} pixels, which cannot be; {checkpoints.RESTART}.")
        return size

    def load(self, device: torch.device, which: str | None = None) -> TrainedNetwork:
        """The network on `device`, with the weights that `choose` names. Raises FastcifarError where they do not fit."""
        name, network, size = self.choose(which), self.network, self.image_size
        model = build_network(network, f"{self.path}'s network", size)
        checkpoints.load_weights(model, self.weights[name], f"{self.path}'s {name}")
        model = model.to(device, memory_format=torch.channels_last).eval()
        normalization = Normalization(network["mean"], network["std"])
        return TrainedNetwork(model, normalization, tuple(network["classes"]), size, name, network["arch"])


def load_network(path: Path, device: torch.device, which: str | None = None, *, trust: bool = False) -> TrainedNetwork:
    """The network of the run at `path`, on `device`, in eval mode.

    Args:
        path: folder of the run.
        device: where the weights go.
        which: "weights", or the name of an average or a snapshot; by default as `StoredNetwork.choose` has it.
        trust: whether an architecture of the run's own code (`package.module:function`) may be imported, which executes it.

    Raises:
        FastcifarError: no run, no checkpoint, a damaged one, no such weights, or code that is not trusted.
    """
    return read_network(path, trust=trust).load(device, which)


def read_network(path: Path, *, trust: bool = False) -> StoredNetwork:
    """What the last checkpoint of the run at `path` holds; arguments and errors as in `load_network`."""
    state = checkpoints.load(Run.open(path).checkpoints)
    if state is None:
        raise FastcifarError(f"{path} has no checkpoint yet; let it train for an epoch.")
    arch = state.network["arch"]
    if not trust and not OWN_CODE.fullmatch(arch):
        raise FastcifarError(
            f"{path}'s network is built by {arch!r}, code that comes with the run and would be executed; add --trust where you know it."
        )
    validated = {name: best["accuracy"] for name, best in state.progress["best"].items()}
    return StoredNetwork(Path(path), state.network, state.chosen, validated)


def build_network(network: Network, source: str, image_size: int) -> nn.Module:
    """The network that stored weights belong to, on the CPU, for images of `image_size` pixels a side.

    Raises:
        FastcifarError: it describes none that can be built; the sentence begins with `source`.
    """
    options = network["options"] | {"classes": len(network["classes"]), "image_size": image_size}
    try:
        return build_model(network["arch"], **options)
    except Exception as error:  # on hostile options an architecture raises nearly anything
        raise FastcifarError(f"{source} cannot be built ({reason(error)}); {checkpoints.RESTART}.") from error
