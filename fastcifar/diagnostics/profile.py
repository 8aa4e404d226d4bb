"""`fastcifar profile`: times and profiles some training steps, and compares them to the rates of the device."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.checks import given
from fastcifar.config import RunConfig
from fastcifar.data.sources import CIFAR_FORMATS, find
from fastcifar.device import device_name, matmul_flops_per_second, peak_memory_bytes, synchronize
from fastcifar.diagnostics.profile_report import (
    MARK,
    Figures,
    costliest,
    kernel_seconds,
    launches_of,
    share_busy,
    split_of,
    write_report,
)
from fastcifar.engine.memory import DataSize, held_bytes
from fastcifar.engine.run import compile_and_capture
from fastcifar.engine.setup import build_trainer, resolve
from fastcifar.engine.step import Observer, unobserved
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import FastcifarError
from fastcifar.models import ARCHITECTURES, build_model
from fastcifar.runs.console import Console
from fastcifar.runs.files import writing
from fastcifar.runs.provenance import commit, versions

Batches = Iterator[tuple[Tensor, Tensor]]
WARM_UP_STEPS = 3
MOST_TRACED = 16
"""Most steps in a trace, rounded up to whole chunks; more would only make the file larger."""
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""The size of the tensor whose copying is timed: larger than the caches."""
COPY_SECONDS = 0.25
NAMES = {
    "Batches": "data",
    "Forward": "forward",
    "Backward": "backward",
    "SlicedPass": "backward",
    **dict.fromkeys(("Ascend", "Return", "Clip", "Update"), "optimiser"),
    "Average": "averages",
}
"""The part of the split for each class of a part of training, else `other`. The passes of a sliced batch are one part.
"""


def print_profile(config: RunConfig, steps: int, out: Path | None, trust: bool) -> Figures:
    """Trains for `steps` steps, prints where time goes, and writes figures, trace and picture.

    They go to the folder `out`, `profile-ARCH` by default. `trust` allows a teacher of code that is imported.

    Raises:
        FastcifarError: as `engine.run.train`, or because the profiler sees nothing of the GPU.
    """
    console, began = Console(), time.perf_counter()
    folder = out or Path(f"profile-{''.join(c if c.isalnum() or c in '._-' else '-' for c in config.model.arch)}")
    config, notes = resolve(on_data_at_hand(config))
    trainer = build_trainer(config, began, trust=trust)
    for note in notes:
        console.note(note)
    compile_and_capture(trainer, console)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure(trainer, steps, folder / "trace.json.gz")
    for line in write_report(figures, folder):
        console.note(line)
    return figures


def on_data_at_hand(config: RunConfig) -> RunConfig:
    """`config`, with the synthetic images in place of a data set that would be downloaded."""
    name = "cifar10" if config.data.dataset == "auto" else config.data.dataset
    if name in CIFAR_FORMATS and find(name, config.data.data_dir) is None:
        name = "synthetic"
    return replace(config, data=replace(config.data, dataset=name))


class Watch:
    """Sums the seconds of the parts of a step and marks them in a trace.

    It waits for the device, so that the marks enclose a GPU's work."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        name = NAMES.get(part, "other")
        with record_function(MARK + name):
            start = time.perf_counter()
            yield
            synchronize(self.device)
            self.seconds[name] += time.perf_counter() - start


def measure(trainer: Trainer, steps: int, trace: Path) -> Figures:
    """Measures at least `steps` steps, and writes a trace of some to `trace`, a .json.gz file.

    On a CPU the parts are timed as they run. On a GPU, where the host is ahead, steps are timed and traced as training
    launches them; their division comes from kernel times in further steps, launched part by part.
    """
    config, device, on_gpu = trainer.config, trainer.device, trainer.device.type == "cuda"
    chunk = trainer.loader.chunk_size // config.batch_size
    steps, recorded = (math.ceil(count / chunk) * chunk for count in (steps, min(steps, MOST_TRACED)))
    batches, watch = trainer.endless_batches(), Watch(device)
    trainer.run_steps(batches, WARM_UP_STEPS)
    observe = unobserved if on_gpu else watch.on
    seconds = trainer.run_steps(batches, steps, observe) / steps
    parts = {name: spent / steps for name, spent in watch.seconds.items()}
    events = traced(trainer, batches, recorded, observe, trace)
    idle = max(seconds - sum(parts.values()), 0.0)
    if on_gpu:
        parts, idle = parts_on_gpu(trainer, batches, recorded), seconds * (1 - share_busy(events))
    return Figures(
        arch=config.model.arch,
        dataset=config.data.dataset,
        batch_size=config.batch_size,
        precision=trainer.precision.name,
        device=device_name(device),
        compiled=trainer.launch.compiled,
        captured=trainer.launch.captured is not None,
        steps=steps,
        images_per_second=config.batch_size / seconds,
        step_seconds=seconds,
        split=split_of(parts, idle, seconds),
        **launches_of(events, recorded),
        **rates(trainer),
        costliest=costliest(events, recorded),
        peak_memory_bytes=peak_memory_bytes(device),
        versions=versions(),
        commit=commit(),
    )


def traced(
    trainer: Trainer, batches: Batches, steps: int, observe: Observer, path: Path | None = None
) -> Sequence[FunctionEvent]:
    """Runs steps under the profiler, writes its trace to `path`, and returns its events.

    Raises:
        FastcifarError: the profiler sees nothing of the GPU.
    """
    on_gpu = trainer.device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells on stderr when it starts and stops
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu, acc_events=True) as profiler:
        trainer.run_steps(batches, steps, observe)
    if path:
        profiler.export_chrome_trace(str(path))
    events = given(profiler.events())
    if on_gpu and not share_busy(events):
        raise FastcifarError(
            "the profiler sees no kernels; let this user read the GPU's counters (NVIDIA's CUPTI), or try --device cpu."
        )
    return events


def parts_on_gpu(trainer: Trainer, batches: Batches, steps: int) -> dict[str, float]:
    """Kernel seconds of a step by part, in steps that the host launches and waits for part by part."""
    events = traced(trainer, batches, steps, Watch(trainer.device).on)
    return {name: seconds / steps for name, seconds in kernel_seconds(events).items()}


def rates(trainer: Trainer) -> dict[str, float]:
    """The computation and traffic of a step, and the device's rate for each."""
    config, dtype, options = trainer.config, trainer.precision.dtype, trainer.options
    images = config.batch_size * (1 if config.optim.sharpness == "none" else 2)
    held = held_bytes(config, DataSize(0, 0), trainer.count)
    # Weights are read by the pass, read and written by the update, read by the averages; gradients written and read.
    weights = 3 * held["weights"] + 2 * held["gradients"] + 2 * held["optimiser"] + 3 * held["averages"]
    return {
        "flops_per_step": images * trainer.count.training_flops,
        "bytes_per_step": images * moved_values(config.model.arch, **options) * dtype.itemsize + weights,
        "matmul_flops_per_second": matmul_flops_per_second(trainer.device, dtype),
        "copy_bytes_per_second": copy_bytes_per_second(trainer.device),
    }


class Traffic(TorchDispatchMode):
    """Counts values of maps that convolutions read and write, with a gradient each for inputs and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        output = function(*arguments, **(options or {}))
        if function.overloadpacket is torch.ops.aten.convolution:
            self.values += arguments[0].numel() + output.numel()
        elif function.overloadpacket is torch.ops.aten.convolution_backward:
            self.values += sum(arguments[-1][:2]) * (arguments[0].numel() + arguments[1].numel())
        return output


def moved_values(arch: str, **options: Any) -> int:
    """Values an image that convolutions read and write in training: the least traffic, all else being fused."""
    counts = []
    with torch.random.fork_rng(devices=[]), torch.device("meta" if arch in ARCHITECTURES else "cpu"):
        model = build_model(arch, **options).train()
        for images in (2, 3):  # the difference is free of what does not belong to an image
            with Traffic() as traffic:
                model(torch.zeros(images, 3, options["image_size"], options["image_size"])).sum().backward()
            counts.append(traffic.values)
    return counts[1] - counts[0]


def copy_bytes_per_second(device: torch.device) -> float:
    """The best rate of copying a large tensor within a quarter of a second, counting both reads and writes."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best, end = math.inf, time.perf_counter() + COPY_SECONDS
    while best == math.inf or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best
