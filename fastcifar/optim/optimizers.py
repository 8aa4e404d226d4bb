"""Builds optimisers by name, in the form with the fewest kernels and no host sync."""

from __future__ import annotations

import inspect
import warnings
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.checks import given
from fastcifar.optim import OPTIMIZERS, OptimConfig
from fastcifar.optim.cycled import CycledSGD
from fastcifar.optim.muon import hidden_matrices

MUON_LR_RATIO = 2.0
"""The learning rate of weights that Muon does not orthogonalise, over that of the others."""


def build_optimizer(model: nn.Module, optim: OptimConfig, *, cycled: bool = False) -> torch.optim.Optimizer:
    """Builds the optimiser of `optim` for the parameters of `model`, with its initial state, all zero.

    If `cycled`, it is SGD, whose momentum is to be set at every step.

    Each group has its own learning rate, to be set to the run's times the group's `lr_ratio`. On a GPU it is a float32
    tensor () there, so that a change costs neither a wait nor a new capture.
    """
    optim, own = optim.resolved, OPTIMIZERS[optim.optimizer]
    kind, device = resolve_name(own.target), next(model.parameters()).device
    settings: dict[str, Any] = {} if own.momentum is None else {"momentum": optim.momentum}
    if cycled:
        kind, settings = CycledSGD, {}
    if own.nesterov and (cycled or optim.momentum):
        settings["nesterov"] = True
    if device.type == "cuda" and "capturable" in inspect.signature(kind).parameters:
        settings["capturable"] = True

    def construct(form: str) -> torch.optim.Optimizer:
        return kind(parameter_groups(model, optim, device), **settings, **({} if form == "own" else {form: True}))

    optimizer = construct(own.form)
    if own.form == "fused" and device.type == "cuda" and not getattr(optimizer, "_step_supports_amp_scaling", False):
        # In torch 2.11 fused Adagrad works only on a CPU, and fails only at its first step.
        optimizer = construct("foreach")
    create_state(optimizer)
    return optimizer


def parameter_groups(model: nn.Module, optim: OptimConfig, device: torch.device) -> list[dict[str, Any]]:
    """The groups of the parameters of `model`, in order, by the treatment that `optim`, resolved, gives them."""
    muon = optim.optimizer == "muon"
    matrices = set(hidden_matrices(model)) if muon else set()
    members: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in model.parameters():
        decays = optim.decay_norms or parameter.dim() > 1
        members.setdefault((parameter in matrices, decays), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (matrix, decays), parameters in members.items():
        ratio = MUON_LR_RATIO if muon and not matrix else 1.0
        lr = given(optim.lr) * ratio
        group = {
            "params": parameters,
            "lr": torch.tensor(lr, device=device) if device.type == "cuda" else lr,
            "lr_ratio": ratio,
            "weight_decay": optim.weight_decay if decays else 0.0,
        }
        groups.append(group | ({"orthogonalize": matrix} if muon else {}))
    return groups


@torch.no_grad()
def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates the state of the first step, which is zero in all optimisers here, without moving parameters.

    So a checkpoint can be copied into it before any step. Moreover, fused SGD would create its momenta uninitialised,
    and keep them so where the loss scale of the first step overflows.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*capturable=True.*")  # torch tells, once, that this step is not captured
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch._foreach_copy_(parameters, kept)
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
