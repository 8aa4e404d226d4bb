"""Builds a run's network, or an ensemble's, from its checkpoints; code in a folder is executed only if trusted."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.augment.normalize import Normalization
from fastcifar.data import IMAGE_SIZES
from fastcifar.data.image_set import ImageSet
from fastcifar.data.sources import IMAGE_SIZE
from fastcifar.errors import ConfigError, FastcifarError, reason, unknown
from fastcifar.models import GIVEN, build_model, check_trusted
from fastcifar.optim.averaging import SWA
from fastcifar.runs import checkpoint as checkpoints
from fastcifar.runs.checkpoint import SNAPSHOT, WEIGHTS, Network
from fastcifar.runs.ensembles import is_ensemble, voters
from fastcifar.runs.folder import Run


@dataclass(frozen=True)
class LoadOptions:
    """How to take the network of a run from its folder."""

    weights: str | None = None
    """"weights", or the name of an average or a snapshot; by default `StoredNetwork.choose` decides."""
    trust: bool = False
    """Whether an architecture of the run's own code (`package.module:function`) may be imported, which executes it."""
    model: nn.Module | None = None
    """The network that was given to `fastcifar.train`, copied to take the weights; by default it is built by name."""


DEFAULT = LoadOptions()


@dataclass(frozen=True)
class TrainedNetwork:
    path: Path
    model: nn.Module
    """Takes (N, 3, image_size, image_size), normalised, to logits (N, classes); in eval mode and channels_last."""
    normalization: Normalization
    classes: tuple[str, ...]
    """Names of the classes, by label."""
    image_size: int
    weights: str
    """Name of the run's weights that it holds: "weights", or an average or a snapshot."""
    arch: str
    images: dict[str, str]
    """Digests of the training and the test set of its run, by split; empty where the run does not know them."""

    def knows(self, split: Literal["train", "test"], images: ImageSet) -> bool | None:
        """Whether `images` are those of its run; None where the run was made by a version that did not note them."""
        return self.images[split] == images.digest() if split in self.images else None


@dataclass(frozen=True)
class StoredNetwork:
    path: Path
    network: Network
    images: dict[str, str]
    weights: dict[str, dict[str, Tensor]]
    """Tensors by name: "weights" first, then each average that the run keeps, and each snapshot."""
    validated: dict[str, float]
    """Accuracy of each on the validation split; empty without one."""
    model: nn.Module | None = None
    """A network to copy for the weights, in place of one built by name."""

    @property
    def snapshots(self) -> list[str]:
        """Names of the weights kept at the ends of cycles, in order."""
        return [name for name in self.weights if SNAPSHOT.fullmatch(name)]

    def choose(self, which: str | None) -> str:
        """Returns `which`, by default the best weights on the validation split, else an average, else "weights".

        Without a validation split it is the first average. Raises FastcifarError where the run has none of that name.
        """
        if which is None:
            averages_first = sorted(self.weights, key=lambda name: name == WEIGHTS)
            return max(
                (name for name in averages_first if name not in self.snapshots),
                key=lambda name: self.validated.get(name, 0.0),
            )
        if which not in self.weights:
            raise FastcifarError(f"{self.path}: {unknown('weights', which, self.weights)}")
        return which

    @property
    def image_size(self) -> int:
        """Pixels a side. Raises FastcifarError where no images have that size."""
        size = self.network["options"].get("image_size", IMAGE_SIZE)
        if type(size) is not int or size not in IMAGE_SIZES:
            raise FastcifarError(
                f"{self.path}'s network is for images of {size!r} pixels, which cannot be; {checkpoints.RESTART}."
            )
        return size

    def load(self, device: torch.device, which: str | None = None) -> TrainedNetwork:
        """Loads the network with the weights that `choose` names, in eval mode. Raises FastcifarError on a misfit."""
        name, network, size = self.choose(which), self.network, self.image_size
        model = build_network(self.path, network, size) if self.model is None else copy.deepcopy(self.model)
        checkpoints.copy_tensors(self.weights[name], model.state_dict(), f"{self.path}'s {name}")
        model = model.to(device).to(memory_format=torch.channels_last).eval()
        normalization = Normalization(network["mean"], network["std"])
        classes = tuple(network["classes"])
        return TrainedNetwork(self.path, model, normalization, classes, size, name, network["arch"], self.images)


def load_networks(path: Path, device: torch.device, options: LoadOptions = DEFAULT) -> tuple[TrainedNetwork, ...]:
    """Loads the network of the run at `path`, in a tuple of one, or those of an ensemble's folder that vote.

    Raises FastcifarError as `read_network` and `StoredNetwork.load` do; or where weights are named for an ensemble, or
    it lacks a member, or its members do not agree.
    """
    if not is_ensemble(path):
        return (read_network(path, options).load(device, options.weights),)
    if options.weights is not None:
        raise ConfigError(
            f"{path} is an ensemble, which says itself which weights of its members vote; "
            f"leave --weights {options.weights} out."
        )
    networks = tuple(read_network(run, options).load(device, weights) for run, weights in voters(path))
    check_agreement(networks)
    return networks


def check_agreement(networks: Sequence[TrainedNetwork]) -> None:
    """Raises ConfigError where the networks differ in their classes, the classes' order, or the image size."""
    first = networks[0]
    for other in networks[1:]:
        if other.classes != first.classes:
            raise ConfigError(f"{other.path} knows other classes than {first.path}; give runs on the same data set.")
        if other.image_size != first.image_size:
            sizes = f"{other.image_size} pixels a side and {first.path} {first.image_size}"
            raise ConfigError(f"{other.path} takes images of {sizes}; give runs on the same data set.")


def read_network(path: Path, options: LoadOptions = DEFAULT) -> StoredNetwork:
    """Reads a run's last checkpoint, without SWA's weights where the run has not ended.

    Raises FastcifarError if it is missing or damaged, or needs code not trusted.
    """
    run = Run.open(path)
    state = checkpoints.load(run.checkpoints)
    if state is None:
        raise FastcifarError(f"{path} has no checkpoint yet; let it train for an epoch.")
    arch = state.network["arch"]
    if options.model is None and arch == GIVEN:
        raise ConfigError(
            f"{path}'s network was given in Python and has no name to be built by; give it again in Python, as model=."
        )
    if options.model is None:
        check_trusted(arch, path, options.trust)
    weights = state.chosen
    if state.progress["epoch"] < run.config().epochs:
        # It may not have begun, and its batch norm statistics are measured at the end.
        weights.pop(SWA, None)
    validated = {name: best["accuracy"] for name, best in state.progress["best"].items()}
    images = state.progress.get("images", {})
    return StoredNetwork(path, state.network, images, weights, validated, options.model)


def build_network(path: Path, network: Network, image_size: int) -> nn.Module:
    """Builds the network of the run at `path`, on the CPU. Raises FastcifarError where `network` describes none."""
    options = network["options"] | {"classes": len(network["classes"]), "image_size": image_size}
    try:
        return build_model(network["arch"], **options)
    except Exception as error:  # on hostile options an architecture raises nearly anything
        raise FastcifarError(f"{path}'s network cannot be built ({reason(error)}); {checkpoints.RESTART}.") from error


def joint_logits(each: Sequence[Tensor]) -> Tensor:
    """Logits (N, C) of every member -> logits of their mean probabilities, float32 (N, C); one alone is unchanged."""
    if len(each) == 1:
        return each[0]
    shares = torch.stack([F.log_softmax(logits.float(), dim=1) for logits in each])
    return shares.logsumexp(dim=0) - math.log(len(each))
