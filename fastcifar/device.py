"""The machine that a run uses: its device, precision, memory, threads and allocator."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastcifar.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Returns the device that `name` stands for, a GPU with its index. Raises ConfigError where it does not exist."""
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ConfigError(f"device {name} was not found, among {count} CUDA devices; choose another or --device auto.")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of returning it to the kernel; memory use then stays at its peak.

    A step allocates and frees the same tens of megabytes over and over; once returned, every page is faulted in and
    zeroed anew. On two CPU cores a compiled `resnet20_v2` step takes 80 ms in place of 112 ms. The names are those of
    `man 3 mallopt`; older versions of glibc take no threshold above 32 MiB.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25):
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(top_pad, 64 << 20)


def peak_memory_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Returns the peak of bytes allocated by torch on a GPU, or resident for the process on a CPU; None if not known.

    Linux's `getrusage` is not used, since a process inherits the peak of the one that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return process_status("VmHWM", root)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def own_memory(root: Path = Path("/")) -> int:
    """Returns the bytes of main memory private to this process, which it can reuse; 0 where Linux does not tell."""
    return process_status("RssAnon", root) or 0


def process_status(name: str, root: Path) -> int | None:
    """Reads the bytes under `name` for this process (`man 5 proc_pid_status`); None where Linux does not tell."""
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB", (root / "proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Returns the free bytes on `device`, beyond what this process has taken; None where the system does not tell.

    For main memory this is what Linux calls available, as files cached in it give way, within the limits of the control
    groups.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = re.search(r"MemAvailable:\s*(\d+)", (root / "proc/meminfo").read_text())
    except OSError:
        return None
    return max(0, min([1024 * int(available[1]), *group_rooms(root)])) if available else None


GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Files that hold a control group's limit, use and inactive file cache: versions 2 and 1, by controller."""


def group_rooms(root: Path) -> Iterator[int]:
    """Yields the bytes left in this process's control groups and those above; a container may not see its own name."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for _, controllers, name in (line.split(":", 2) for line in lines):
        if not (found := GROUPS.keys() & set(controllers.split(","))):
            continue
        place, limit, usage, files = GROUPS[found.pop()]
        group = root / place / name.lstrip("/")
        for folder in (group, *group.parents[: len(Path(name).parts) - 1]):
            try:
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                given_up = re.search(rf"^{files} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
            except (OSError, ValueError):  # the group has no limit
                continue
            yield left + (int(given_up[1]) if given_up else 0)


def device_name(device: torch.device) -> str:
    """Returns the maker's name of `device`; for a CPU also the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' * (threads > 1)}"


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the FLOP rate of a large square matrix product: the best of a quarter of a second, on random numbers."""
    size = MATRIX_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + 0.25
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def random_state_of(device: torch.device) -> Tensor:
    """Returns the state of the generator that dropout draws from, uint8 (bytes,)."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


OLDEST_BF16 = (8, 0)
"""Lowest compute capability of NVIDIA cards that multiply bfloat16."""


def native_bf16(device: torch.device) -> bool:
    """Tells whether `device` multiplies bfloat16 in hardware; emulation, which torch calls support, does not count."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= OLDEST_BF16
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """The type that convolutions and matrix products compute in; weights and statistics stay float32."""

    name: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    @property
    def scaled(self) -> bool:
        """Whether gradients would underflow without a scaled loss."""
        return self.name == "fp16"

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.name != "fp32")


def resolve_precision(requested: str, device: torch.device) -> Precision:
    """Returns what `auto` is on `device`, or what was requested. Raises ConfigError where `device` lacks that."""
    native = native_bf16(device)
    if requested == "auto":
        return Precision("bf16" if native else "fp16" if device.type == "cuda" else "fp32")
    if requested == "bf16" and not native and device.type == "cuda":
        raise ConfigError("this GPU has no native bfloat16; choose --precision fp16 or auto.")
    if requested == "fp16" and device.type == "cpu":
        raise ConfigError("float16 needs a GPU; choose --precision bf16, fp32 or auto.")
    return Precision(requested)
