"""Decides every `auto` of a configuration, once, for the machine at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fastcifar.augment.policy import parse
from fastcifar.config import RunConfig
from fastcifar.data.loader import resolve_backend
from fastcifar.data.sources import check_data_dir, is_path, resolve_auto
from fastcifar.device import resolve_device, resolve_precision
from fastcifar.errors import ConfigError


def resolve(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """`config` with its choices made, but for compiling and what depends on memory, and a line for each that the user
    should know of.

    Raises:
        ConfigError: something was asked for that this machine does not have.
        DataError: `data_dir` is no folder, or the data set `auto` names cannot be reached.
    """
    notes = []
    engine, data = config.engine, config.data
    check_data_dir(data.data_dir)
    device = resolve_device(engine.device)
    precision, step_down = resolve_precision(engine.precision, device)
    if data.dataset == "auto":
        name, reason = resolve_auto(data.data_dir)
        notes.append(f"Training on {reason.rstrip('.')}.")
        data = replace(data, dataset=name)
    elif is_path(data.dataset):
        data = replace(data, dataset=str(Path(data.dataset).expanduser().resolve()))
    if step_down:
        notes.append(step_down)
    if data.data_dir is not None:
        data = replace(data, data_dir=data.data_dir.expanduser().resolve())
    data = replace(data, augment=str(parse(data.augment)), loader=resolve_backend(data.loader, device))
    if device.type == "cpu" and engine.capture == "on":
        raise ConfigError("only a GPU's steps can be captured; leave --capture out, or choose --device cuda.")
    capture = "off" if device.type == "cpu" else engine.capture
    engine = replace(
        engine,
        capture=capture,
        device=str(device),
        precision=precision.name,
        threads=engine.threads or torch.get_num_threads(),
    )
    loss = config.loss.resolved
    if loss.teacher is not None:
        loss = replace(loss, teacher=loss.teacher.expanduser().resolve())
    return replace(
        config, data=data, optim=config.optim.resolved, schedule=config.schedule.resolved, loss=loss, engine=engine
    ), notes
