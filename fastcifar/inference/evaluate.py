"""Accuracy of a finished or interrupted run, from its folder alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastcifar.augment.normalize import Normalization
from fastcifar.data.sources import load_dataset
from fastcifar.engine.evaluate import Evaluation, evaluate
from fastcifar.engine.host import resolve_device
from fastcifar.engine.precision import resolve_precision
from fastcifar.errors import FastcifarError
from fastcifar.models import build_model
from fastcifar.runs import checkpoint as checkpoints
from fastcifar.runs.checkpoint import Network
from fastcifar.runs.files import reason
from fastcifar.runs.folder import Run


def evaluate_run(path: Path, data_dir: Path | None = None) -> dict[str, Evaluation]:
    """Test loss and accuracy of the weights ("raw") and of their average ("averaged"), where the run keeps one.

    Network and preprocessing are those stored with the weights.

    Raises:
        FastcifarError: the folder is no run, or has no checkpoint yet; DataError where the data set is not to be had.
    """
    run = Run.open(path)
    config = run.config()
    state = checkpoints.load(run.checkpoints)
    if state is None:
        raise FastcifarError(f"{path} has no checkpoint yet; let it train for an epoch.")
    device = resolve_device("auto")
    requested = config.engine.precision if config.engine.device == str(device) else "auto"
    precision, _ = resolve_precision(requested, device)
    test = load_dataset(config.data.dataset, "test", data_dir or config.data.data_dir).to(device)
    network = state.network
    if network["classes"] != list(test.classes):
        raise FastcifarError(f"{path} was trained on other classes than {config.data.dataset} has; restore the data set it was trained on.")
    model = build_network(network, f"{path}'s network", test.images.shape[1]).to(device, memory_format=torch.channels_last)
    normalization = Normalization(network["mean"], network["std"])
    found = {}
    for name, weights in (("raw", state.weights), ("averaged", state.averaged)):
        if weights:
            checkpoints.load_weights(model, weights, f"{path}'s {name} weights")
            found[name] = evaluate(model, test, normalization, precision)
    return found


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
