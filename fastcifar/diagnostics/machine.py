"""Facts about the machine, and small trials of what training would use; torch is imported only when needed."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastcifar.errors import reason

if TYPE_CHECKING:
    import torch

KernelObstacle = Literal["kernels_switched_off", "triton_absent", "card_too_old", "kernel_failed"]
REACH_SECONDS = 5.0
"""Most seconds to wait for an address that a data set would be fetched from."""


def torch_at_hand() -> tuple[str | None, str | None, str]:
    """The version of torch, its CUDA version, and why it cannot be imported; None for what is missing."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return None, None, reason(error)
    return torch.__version__, torch.version.cuda, ""


def driver_version() -> str | None:
    """The version of NVIDIA's driver, from Linux or from nvidia-smi; None where there is none."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    if found:
        return found[1]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def cuda_failure() -> str:
    """Why torch cannot use CUDA; empty where it can."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return reason(error)
    return ""


def runs_on(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether a card runs code of `built`: machine code of its generation, no newer, or any older intermediate code."""
    for kind, digits in re.findall(r"(sm|compute)_(\d+)", " ".join(built)):
        version = divmod(int(digits), 10)
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return False


def kernel_obstacle(device: torch.device) -> tuple[KernelObstacle, str] | None:
    """What prevents the use of the kernels on `device`, and the error, after running and comparing a small one."""
    import torch

    from fastcifar.kernels import dispatch
    from fastcifar.kernels.averaging import ema_update_

    if device.type == "cuda" and not dispatch.KERNELS_EXIST:
        return "kernels_switched_off" if dispatch.SWITCH == "reference" else "triton_absent", ""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < dispatch.OLDEST_CAPABILITY:
        return "card_too_old", ""
    try:
        average, source = torch.zeros(1, 5, device=device), torch.arange(5.0, device=device)
        ema_update_(average, source, torch.tensor([0.75], device=device))
        torch.testing.assert_close(average[0], source / 4)
    except Exception as error:
        return "kernel_failed", reason(error)
    return None


def dali_obstacle(device: torch.device) -> tuple[Literal["absent", "failed"], str] | None:
    """What prevents the use of DALI on `device`, and the error, after running a small pipeline."""
    from fastcifar.data.loader import dali_installed

    if not dali_installed():
        return "absent", ""
    from fastcifar.augment.dali_apply import why_unusable

    error = why_unusable(device)
    return ("failed", error) if error else None


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile does not work, or None, after compiling and comparing a few operations."""
    import torch

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    x = torch.linspace(-2, 2, 17, device=device, requires_grad=True)
    try:
        torch.testing.assert_close(torch.compile(lambda x: (x.sin() * 2).relu())(x), (x.sin() * 2).relu())
    except Exception as error:
        return reason(error)
    return None


def answers(address: str) -> bool:
    """Whether a server would send the file at `address`."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=REACH_SECONDS):
            return True
    except (OSError, ValueError):
        return False


def usable_cpus() -> int:
    """The number of CPUs that this process may use, by its affinity and the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count
