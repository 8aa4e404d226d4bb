"""Copies weights into our networks from those that another library built in the same order."""

import torch
from torch import nn

WEIGHTED = nn.Conv2d | nn.BatchNorm2d | nn.Linear


def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Copies layer by layer, in the order of their registration; 1x1 convolutions may stand for linear layers."""
    randomise_norms(theirs)
    for target, source in zip(weighted(ours), weighted(theirs), strict=True):
        state = {key: value for key, value in source.state_dict().items() if key != "num_batches_tracked"}
        if isinstance(target, nn.Linear):
            state["weight"] = state["weight"].flatten(1)
        target.load_state_dict(state)


def weighted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, WEIGHTED)]


def randomise_norms(model: nn.Module) -> None:
    """Randomises the norms, so that a norm taken for another shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)


def assert_same_training_step(ours: nn.Module, theirs: nn.Module, images: torch.Tensor) -> None:
    ours, theirs, images = ours.double(), theirs.double(), images.double()
    torch.testing.assert_close(ours(images), theirs(images))
    for target, source in zip(weighted(ours), weighted(theirs), strict=True):
        if isinstance(target, nn.BatchNorm2d):
            torch.testing.assert_close(target.running_var, source.running_var)
