"""Optimisers by name, in the form that needs the fewest kernels and no host sync."""

from __future__ import annotations

import torch
from torch import nn

from fastcifar.config import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that `optim` names, over the parameters of `model`; on a GPU its learning rate is a tensor there."""
    optim, parameters = optim.resolved, list(model.parameters())
    rate = torch.tensor(optim.lr, device=parameters[0].device) if parameters[0].is_cuda else optim.lr
    momentum, nesterov = optim.momentum, optim.optimizer == "sgd-nesterov" and optim.momentum > 0
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=momentum, nesterov=nesterov, weight_decay=optim.weight_decay, fused=True)
    if momentum:
        # Left to itself, the fused kernel makes these at the first step, uninitialised, and keeps them so where a loss scale overflows.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
