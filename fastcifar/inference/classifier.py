"""Trained networks with all they need to classify: preprocessing, a device, a precision and views to average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.augment.normalize import Normalizer
from fastcifar.device import Precision, resolve_device, resolve_precision
from fastcifar.engine.evaluate import BATCH_SIZE
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.inference import TTA, PrecisionName
from fastcifar.runs.folder import Run
from fastcifar.runs.network import LoadOptions, TrainedNetwork, check_agreement, joint_logits, load_networks


@dataclass(frozen=True)
class Classifier:
    """Maps bytes to logits by one network, or by the mean probabilities of several, each of which counts the same."""

    networks: tuple[TrainedNetwork, ...]
    """Networks of the same classes and image size."""
    device: torch.device
    precision: Precision

    @property
    def classes(self) -> tuple[str, ...]:
        return self.networks[0].classes

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.networks[0].image_size

    @property
    def batch_size(self) -> int:
        """Images classified at once, so that memory stays bounded."""
        return max(1, BATCH_SIZE[self.device.type] * 32**2 // self.image_size**2)

    @torch.inference_mode()
    def __call__(self, images: Tensor, tta: TTA = "none") -> Tensor:
        """Images uint8 (N, H, W, 3) all at once -> logits, float32 (N, classes), on the classifier's device."""
        return joint_logits([self.ask(network, images.to(self.device), tta) for network in self.networks])

    def ask(self, network: TrainedNetwork, images: Tensor, tta: TTA) -> Tensor:
        """Images uint8 (N, H, W, 3), on the device -> the logits of one network, float32 (N, classes)."""
        normalised = Normalizer(network.normalization, self.device)(images.permute(0, 3, 1, 2), self.precision.dtype)
        with self.precision.autocast(self.device):
            return logits_of_views(network.model, normalised, tta)

    def logits(self, images: Tensor, tta: TTA = "none") -> Tensor:
        """Does the same in batches, with the result on the CPU. Raises FastcifarError on infinite or NaN logits."""
        each = []
        for network in self.networks:
            alone = Classifier((network,), self.device, self.precision)
            logits = torch.cat([alone(batch, tta) for batch in images.split(self.batch_size)]).cpu()
            if not logits.isfinite().all():
                raise FastcifarError(
                    f"{network.path}'s network gives infinite or NaN outputs, so it cannot classify; choose another "
                    "run."
                )
            each.append(logits)
        return joint_logits(each)

    def probabilities(self, images: Tensor, tta: TTA = "none") -> Tensor:
        """The softmax of `logits`, float64 (N, classes)."""
        return self.logits(images, tta).double().softmax(dim=1)


def open_classifier(
    runs: str | Path | Sequence[str | Path], options: LoadOptions, precision: PrecisionName = "auto"
) -> Classifier:
    """Opens runs or ensembles, on a GPU if there is one. Raises FastcifarError if one is unusable, or they differ."""
    paths = [Path(path) for path in ([runs] if isinstance(runs, str | Path) else runs)]
    if not paths:
        raise ConfigError("there is no run to predict with; name the folder of one or more.")
    device = resolve_device("auto")
    networks = tuple(network for path in paths for network in load_networks(path, device, options))
    check_agreement(networks)
    return Classifier(networks, device, precision_of(networks, device, precision))


def precision_of(
    networks: Sequence[TrainedNetwork], device: torch.device, requested: PrecisionName = "auto"
) -> Precision:
    """Returns the precision requested.

    By default it is the one shared by all runs, or else float32; a run that was trained on another device has the best
    of this one.
    """
    if requested == "auto":
        shared: set[PrecisionName] = set()
        for engine in (Run.open(network.path).config().engine for network in networks):
            shared.add(engine.precision if engine.device == str(device) else "auto")
        requested = shared.pop() if len(shared) == 1 else "fp32"
    return resolve_precision(requested, device)


def logits_of_views(model: nn.Module, images: Tensor, tta: TTA) -> Tensor:
    """Averages the logits of several views of normalised images (N, 3, H, W) -> float32 (N, classes).

    "mirror" averages an image and its mirror image: two passes. "mirror-shift" gives half the weight to that, and half
    to the same of the image moved by a pixel, down and right, and up and left, over a border of reflected pixels: six
    passes, as airbench's `infer_mirror_translate` does (Jordan 2024, arXiv:2404.00498, multi-crop evaluation).
    """
    if tta == "none":
        return model(images).float()
    if tta == "mirror":
        mirrored = images.flip(3).contiguous(memory_format=torch.channels_last)
        return (model(images).float() + model(mirrored).float()) / 2
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    moved = [padded[:, :, shift : shift + height, shift : shift + width] for shift in (0, 2)]
    shifted = [logits_of_views(model, view.contiguous(memory_format=torch.channels_last), "mirror") for view in moved]
    return (logits_of_views(model, images, "mirror") + torch.stack(shifted).mean(0)) / 2
