"""Builds a trainer for this machine from a configuration."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fastcifar.augment.policy import parse
from fastcifar.checks import given
from fastcifar.config import EngineConfig, RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import resolve_backend
from fastcifar.data.sources import check_data_dir, is_path, load_dataset, resolve_auto
from fastcifar.data.splits import validation_split
from fastcifar.device import DTYPES, keep_freed_memory, resolve_device, resolve_precision
from fastcifar.engine.compile import keep_artefacts
from fastcifar.engine.memory import DataSize, check_passes, fit_to_memory, footprint, limit_memory, memory_limit
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import ConfigError
from fastcifar.models.count import count_model, count_network
from fastcifar.models.plug_ins import checked, refused

STEPPED_DOWN = {
    "fp16": "This GPU has no native bfloat16: computing in float16 with a scaled loss.",
    "fp32": "This CPU has no native bfloat16: computing in float32.",
}
"""What a user is told where the precision `auto` is not bfloat16."""


def resolve(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Resolves every `auto` in `config` except for compiling, capturing and what depends on memory.

    Returns the configuration, and a line for each choice that the user should know of. Raises ConfigError where this
    machine lacks what was asked for; DataError where `data_dir` is no folder, or the data set that `auto` names cannot
    be reached.
    """
    notes = []
    engine, data, loss = config.engine, config.data, config.loss.resolved
    check_data_dir(data.data_dir)
    device = resolve_device(engine.device)
    precision = resolve_precision(engine.precision, device)
    if data.dataset == "auto":
        name, reason = resolve_auto(data.data_dir)
        notes.append(f"Training on {reason.rstrip('.')}.")
        data = replace(data, dataset=name)
    elif is_path(data.dataset):
        data = replace(data, dataset=str(absolute(Path(data.dataset))))
    if engine.precision == "auto" and precision.name in STEPPED_DOWN:
        notes.append(STEPPED_DOWN[precision.name])
    if device.type == "cpu" and engine.capture == "on":
        raise ConfigError("only a GPU's steps can be captured; leave --capture out, or choose --device cuda.")
    data = replace(
        data,
        data_dir=data.data_dir and absolute(data.data_dir),
        augment=str(parse(data.augment)),
        loader=resolve_backend(data.loader, device),
    )
    engine = replace(
        engine,
        capture="off" if device.type == "cpu" else engine.capture,
        device=str(device),
        precision=precision.name,
        threads=engine.threads or torch.get_num_threads(),
    )
    loss = replace(loss, teacher=loss.teacher and absolute(loss.teacher))
    optim, schedule = config.optim.resolved, config.schedule.resolved
    return replace(config, data=data, optim=optim, schedule=schedule, loss=loss, engine=engine), notes


def absolute(path: Path) -> Path:
    return Path(os.path.expanduser(path)).resolve()  # which leaves an unknown user as it is


@dataclass(frozen=True)
class Images:
    """The whole data set of a run; `train` includes the validation images."""

    train: ImageSet
    test: ImageSet

    def steps_per_epoch(self, config: RunConfig) -> int:
        return (len(self.train) - config.data.val_split) // config.batch_size


def open_images(config: RunConfig, train_set: ImageSet | None = None, test_set: ImageSet | None = None) -> Images:
    """Returns the sets given, or loads those that `config` names. Raises FastcifarError where they cannot be had."""
    if train_set is None and test_set is None:
        return Images(*(load_dataset(config.data.dataset, split, config.data.data_dir) for split in ("train", "test")))
    if train_set is None or test_set is None:
        raise ConfigError("train_set and test_set belong together; give both or none.")
    if train_set.classes != test_set.classes or train_set.images.shape[1:] != test_set.images.shape[1:]:
        raise ConfigError(
            "train_set and test_set differ in their classes or in the size of their images; give two of a kind."
        )
    return Images(train_set, test_set)


def build_trainer(
    config: RunConfig,
    began: float | None = None,
    images: Images | None = None,
    model: nn.Module | None = None,
    trust: bool = False,
) -> Trainer:
    """Builds the trainer of a resolved configuration, laid out for the available memory.

    The run began at `began`, by `time.perf_counter()`, or now; `images` and `model` replace those of `config`.
    `trust` allows a teacher of code that is imported.
    """
    prepare_machine(config.engine)
    images = images or open_images(config)
    train, validation = images.train, None
    size = DataSize(len(train), len(images.test), len(train.classes), train.image_size)
    if model is None:
        options = {"classes": size.classes, "image_size": size.image_size, **config.model.options}
        count = count_network(config.model.arch, **options)
    else:
        with refused(
            f"model={type(model).__name__}(...)",
            f"{size.image_size}x{size.image_size} images and {size.classes} classes",
        ):
            model = checked(model.cpu(), size.classes, size.image_size)
        count = count_model(copy.deepcopy(model), size.image_size)
    device = torch.device(config.engine.device)
    taken = footprint(config, size, device, DTYPES[config.engine.precision].itemsize, count)
    config, plan = fit_to_memory(config, taken, memory_limit(config.engine, device))
    check_passes(config.model.arch, config.batch_size, given(config.engine.micro_batch), count)
    if config.data.val_split:
        kept, apart = validation_split(train.labels, config.data.val_split, config.data.split_seed, size.classes)
        train, validation = train.subset(kept), train.subset(apart)
    watched = images.test if config.watch_test else None
    trainer = Trainer(config, train, validation, watched, began=began, memory=plan, model=model, trust=trust)
    trainer.count = count
    return trainer


def prepare_machine(engine: EngineConfig) -> None:
    """Applies the process-wide settings that a run relies on."""
    if engine.threads:
        torch.set_num_threads(engine.threads)
    keep_artefacts()
    device = resolve_device(engine.device)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)
        if engine.memory_limit_bytes:
            limit_memory(engine.memory_limit_bytes, device)
        torch.backends.cudnn.benchmark = not engine.deterministic
        torch.backends.cudnn.benchmark_limit = 0  # tries all algorithms, once for each shape; by default ten
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = engine.precision != "fp32"
    if engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # A property of the class that this module is given when it is imported, which pyright cannot see.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(engine.deterministic)
