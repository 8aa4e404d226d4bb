"""A run's network with all it needs to classify: its preprocessing, a device and a precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastcifar.augment.normalize import Normalizer
from fastcifar.engine.evaluate import BATCH_SIZE
from fastcifar.engine.host import resolve_device
from fastcifar.engine.precision import Precision, resolve_precision
from fastcifar.errors import FastcifarError
from fastcifar.inference import TTA
from fastcifar.inference.tta import logits_of_views
from fastcifar.runs.folder import Run
from fastcifar.runs.network import TrainedNetwork, load_network


@dataclass(frozen=True)
class Classifier:
    """From bytes to logits."""

    path: Path
    """Of the run."""
    network: TrainedNetwork
    device: torch.device
    precision: Precision

    @torch.inference_mode()
    def __call__(self, images: Tensor, tta: TTA = "none") -> Tensor:
        """Images uint8 (N, H, W, 3), on any device, all at once -> logits, float32 (N, classes), on the classifier's."""
        normalize = Normalizer(self.network.normalization, self.device)
        normalised = normalize(images.to(self.device).permute(0, 3, 1, 2), self.precision.dtype)
        with self.precision.autocast(self.device):
            return logits_of_views(self.network.model, normalised, tta)

    def logits(self, images: Tensor, tta: TTA = "none") -> Tensor:
        """The same in batches, with the result on the CPU.

        Raises:
            FastcifarError: infinite or NaN logits, as of a run that diverged.
        """
        logits = torch.cat([self(batch, tta) for batch in images.split(self.batch_size)]).cpu()
        if not logits.isfinite().all():
            raise FastcifarError(f"{self.path}'s network gives infinite or NaN outputs, so it cannot classify; choose another run.")
        return logits

    @property
    def batch_size(self) -> int:
        """Images at once, so that memory stays bounded."""
        return max(1, BATCH_SIZE[self.device.type] * 32**2 // self.network.image_size**2)


def open_classifier(path: Path, which: str | None = None, *, trust: bool = False) -> Classifier:
    """The classifier of the run at `path`, on a GPU where there is one; arguments and errors as in `runs.network.load_network`."""
    device = resolve_device("auto")
    return Classifier(path, load_network(path, device, which, trust=trust), device, precision_of(path, device))


def precision_of(path: Path, device: torch.device) -> Precision:
    """The precision that the run at `path` was trained in, or on another device the best that `device` has."""
    engine = Run.open(path).config().engine
    requested = engine.precision if engine.device == str(device) else "auto"
    return resolve_precision(requested, device)[0]
