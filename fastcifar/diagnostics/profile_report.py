"""Evaluates the events of a profiled training run, and reports a profile as lines, JSON and a picture."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import DeviceType

from fastcifar.engine.memory import size
from fastcifar.plots import draw, plot_split
from fastcifar.runs.files import write_text

PARTS = ("data", "forward", "backward", "optimiser", "averages", "other", "idle")
"""The parts of a step's time. `other` is counting and measuring; `idle` is the device's, and on a CPU the loop's own
time."""
MARK = "part: "
"""The prefix in a trace of the names of a step's parts."""
SHOWN = 10
"""Kernels, or operations, in the list of the costliest."""
LAUNCHES = re.compile(r"(cuda|cu)(Launch|GraphLaunch|Memcpy|Memset)")
"""The calls by which the host puts work on a GPU."""


@dataclass(frozen=True)
class OperationTime:
    """The time in a step of the kernels, or operations, of one name."""

    name: str
    calls: float
    seconds: float
    """Seconds without the operations called within."""


@dataclass(frozen=True)
class Figures:
    """A profile; times in seconds, sizes in bytes, shares as fractions."""

    arch: str
    dataset: str
    batch_size: int
    precision: str
    device: str
    compiled: bool
    captured: bool
    """Whether steps were launched as CUDA graphs."""
    steps: int
    """Number of timed steps."""
    images_per_second: float
    step_seconds: float
    split: dict[str, float]
    """Seconds a step by `PARTS`, which sum to `step_seconds`."""
    launches: float
    """Kernels, copies and fills in a step; on a CPU, operations that the step calls."""
    host_launches: float | None
    """The host's launch calls in a step, fewer where a graph holds many kernels; None on a CPU."""
    flops_per_step: float
    """FLOPs of a step; a multiplication and an addition are two."""
    bytes_per_step: float
    """Bytes that convolutions and the weight update read and write: the least traffic of a step."""
    matmul_flops_per_second: float
    """The rate of a large matrix product on this device, measured beside the steps."""
    copy_bytes_per_second: float
    """The rate of a large copy, measured beside the steps."""
    costliest: tuple[OperationTime, ...]
    peak_memory_bytes: int | None
    versions: dict[str, str]
    commit: str | None

    @property
    def floors(self) -> dict[str, float]:
        """Least seconds of a step at the measured rates: of arithmetic alone, and of traffic alone."""
        return {
            "arithmetic": self.flops_per_step / self.matmul_flops_per_second,
            "bandwidth": self.bytes_per_step / self.copy_bytes_per_second,
        }

    @property
    def flop_utilization(self) -> float:
        """The rate of a step's FLOPs, as a share of that of a large matrix product."""
        return self.floors["arithmetic"] / self.step_seconds

    @property
    def bandwidth_share(self) -> float:
        """The traffic's share of the rate of a large copy, at the least: other traffic is not counted."""
        return self.floors["bandwidth"] / self.step_seconds

    def to_json(self) -> str:
        derived = {name: getattr(self, name) for name in ("floors", "flop_utilization", "bandwidth_share")}
        return json.dumps(asdict(self) | derived, indent=2) + "\n"


def kernels_of(events: Sequence[FunctionEvent]) -> list[FunctionEvent]:
    """The kernels, copies and fills on a GPU, in the order of their start."""
    found = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    return sorted(found, key=lambda event: event.time_range.start)


def operations_of(events: Sequence[FunctionEvent]) -> list[FunctionEvent]:
    """The operations that the host calls, without ranges marked in the code."""
    return [event for event in events if event.device_type == DeviceType.CPU and not event.is_user_annotation]


def share_busy(events: Sequence[FunctionEvent]) -> float:
    """The share of the time from the first kernel's start to the last one's end in which any kernel runs."""
    kernels, busy, reached = kernels_of(events), 0.0, float("-inf")
    for time in (kernel.time_range for kernel in kernels):
        busy += max(0.0, time.end - max(time.start, reached))
        reached = max(reached, time.end)
    return busy / (reached - kernels[0].time_range.start) if busy else 0.0


def kernel_seconds(events: Sequence[FunctionEvent]) -> dict[str, float]:
    """Seconds of the kernels that start within the marks of each part, whichever thread launched them."""
    kernels, found = kernels_of(events), defaultdict[str, float](float)
    for mark in events:
        if mark.device_type == DeviceType.CPU and mark.name.startswith(MARK):
            within = (k for k in kernels if mark.time_range.start <= k.time_range.start <= mark.time_range.end)
            found[mark.name.removeprefix(MARK)] += sum(kernel.time_range.elapsed_us() for kernel in within) / 1e6
    return dict(found)


def split_of(parts: dict[str, float], idle: float, seconds: float) -> dict[str, float]:
    """The seconds of a step by `PARTS`: `parts` fill the time beside `idle` in proportion, since some run at once."""
    busy = sum(parts.values())
    scale = (seconds - idle) / busy if busy else 0.0
    split = {name: parts.get(name, 0.0) * scale for name in PARTS[:-1]}
    return split | {"idle": seconds - sum(split.values())}


def launches_of(events: Sequence[FunctionEvent], steps: int) -> dict[str, float | None]:
    """Launches in a step, on the device and by the host; on a CPU, the operations that no other calls."""
    kernels, operations = kernels_of(events), operations_of(events)
    if not kernels:
        outermost = [one for one in operations if one.cpu_parent is None or one.cpu_parent.is_user_annotation]
        return {"launches": len(outermost) / steps, "host_launches": None}
    calls = sum(bool(LAUNCHES.match(operation.name)) for operation in operations)
    return {"launches": len(kernels) / steps, "host_launches": calls / steps}


def costliest(events: Sequence[FunctionEvent], steps: int) -> tuple[OperationTime, ...]:
    """The kernels, or operations where there are none, that take the most time in a step."""
    seconds, calls = defaultdict[str, float](float), Counter[str]()
    kernels = kernels_of(events)
    for event in kernels or operations_of(events):
        seconds[event.name] += (event.time_range.elapsed_us() if kernels else event.self_cpu_time_total) / 1e6
        calls[event.name] += 1
    longest = sorted(seconds, key=lambda name: -seconds[name])[:SHOWN]
    return tuple(OperationTime(name, calls[name] / steps, seconds[name] / steps) for name in longest)


def write_report(figures: Figures, folder: Path) -> list[str]:
    """Writes profile.json and split.png into `folder`, and returns the lines to print. Raises FastcifarError."""
    write_text(folder / "profile.json", figures.to_json())
    picture = folder / "split.png"
    title = f"a step of {figures.arch}, batch {figures.batch_size}"
    failure = draw(picture, plot_split, figures.split, figures.floors, title)
    files = [folder / "profile.json", *([] if failure else [picture]), folder / "trace.json.gz"]
    told = [*lines(figures), f"{'files':16}{', '.join(map(str, files))} (for Perfetto or chrome://tracing)"]
    return [*told, failure] if failure else told


def lines(figures: Figures) -> list[str]:
    way = f"{'compiled' if figures.compiled else 'not compiled'}, {'captured' if figures.captured else 'not captured'}"
    on_gpu, floors = figures.host_launches is not None, figures.floors
    memory, step = figures.peak_memory_bytes, milliseconds(figures.step_seconds)
    matmul, copy = figures.matmul_flops_per_second / 1e12, figures.copy_bytes_per_second / 1e9
    calls = f", in {figures.host_launches:,.1f} calls of the host" if on_gpu else ""
    lowest = ", ".join(f"{milliseconds(floor)} by {name}" for name, floor in floors.items())
    times = figures.step_seconds / max(floors.values())
    facts = {
        "what": f"{figures.arch} on {figures.dataset}, batches of {figures.batch_size}, {figures.precision}, {way}",
        "device": figures.device,
        "speed": f"{figures.images_per_second:,.0f} img/s, {step} a step, over {figures.steps} steps",
        "launches a step": f"{figures.launches:,.0f} {'kernels' if on_gpu else 'operations'}{calls}",
        "arithmetic": f"{figures.flop_utilization:.1%} of the {matmul:,.3g} TFLOP/s of a large product",
        "bandwidth": f"{figures.bandwidth_share:.1%} or more of the {copy:,.3g} GB/s of a large copy",
        "floor": f"{lowest}; the step takes {times:.2f} times the higher one",
        "peak memory": "not told by this system" if memory is None else size(memory),
    }
    told = [f"{name:16}{text}" for name, text in facts.items()]
    for name, seconds in figures.split.items():
        told.append(f"  {name:14}{milliseconds(seconds):>12}{seconds / figures.step_seconds:8.1%}")
    kind = "kernels" if on_gpu else "operations, each without those it calls"
    told.append(f"The {len(figures.costliest)} costliest {kind}, a step:")
    for one in figures.costliest:
        told.append(f"  {milliseconds(one.seconds):>12}{one.calls:10,.1f} x  {one.name[:90]}")
    return told


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f} ms"
