"""Optimisers by name, in the form that needs the fewest kernels and no host sync."""

from __future__ import annotations

import torch
from torch import nn


def build_optimizer(model: nn.Module, *, lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum over the parameters of `model`; on a GPU its learning rate is a tensor there, set without a sync."""
    parameters = list(model.parameters())
    rate = torch.tensor(lr, device=parameters[0].device) if parameters[0].is_cuda else lr
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay, fused=True)
    if momentum:
        # Left to itself, the fused kernel makes these at the first step, uninitialised, and keeps them so where a loss scale overflows.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
