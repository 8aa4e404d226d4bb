"""Optimisers by name, in the form that needs the fewest kernels and no host sync."""

from __future__ import annotations

import torch
from torch import nn

from fastcifar.config import OptimConfig


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of `config` over the parameters of `model`; on a GPU its learning rate is a tensor there, set without a sync."""
    parameters = list(model.parameters())
    lr = torch.tensor(config.lr, device=parameters[0].device) if parameters[0].is_cuda else config.lr
    return torch.optim.SGD(
        parameters, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0, weight_decay=config.weight_decay, fused=True
    )
