"""`fastcifar doctor`: what of this machine training would use, what stands in its way, and what to install or
change.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from fastcifar.config import RunConfig
from fastcifar.diagnostics import machine
from fastcifar.engine.memory import footprint, lay_out, memory_limit, size
from fastcifar.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

State = Literal["ok", "note", "warning", "error"]
GRAVITY: tuple[State, ...] = ("error", "warning", "note", "ok")

MAIN_JOB = RunConfig()
"""`fastcifar train --arch resnet_prop`."""
PYTHONS = ((3, 11), (3, 13))
"""The oldest and the newest that the package is made for."""
OLDEST_TORCH = (2, 11)
OLDEST_DRIVERS = {"12": "525", "13": "580"}
"""By the CUDA version that torch was built for, as NVIDIA's release notes have them."""
FREE_DISK = 2 * 2**30
"""Bytes that a run with its checkpoints, and a download, take at most."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. An error keeps the main job from running, a warning makes it slower, a note is
    worth knowing.
    """

    name: str
    state: State
    text: str
    remedy: str | None = None
    """What to install or change."""


def diagnose(device: str = "auto", data_dir: Path | None = None, *, quick: bool = False) -> int:
    """Prints what was found, then what to do about it, most important first. Returns 1 where the main job could not
    run, else 0.

    Args:
        device: as of a run.
        data_dir: folder to look for CIFAR-10 in, before the usual ones.
        quick: do not try the compiler, which takes some seconds.
    """
    findings, console = examine(device, data_dir, quick), Console(highlight=False, soft_wrap=True)
    for finding in findings:
        console.print(
            f"{finding.state:8}{finding.name:10}{finding.text}", markup=False, style="bold" if finding.remedy else None
        )
    problems = remedies(findings)
    if problems:
        console.print("\nTo install or change, most important first:")
    for number, finding in enumerate(problems, start=1):
        console.print(f"{number:3}. {finding.name}: {finding.remedy}.", markup=False)
    possible = all(finding.state != "error" for finding in findings)
    console.print(
        f"\nfastcifar train --arch {MAIN_JOB.model.arch} {'can' if possible else 'cannot'} run here.", style="bold"
    )
    return 0 if possible else 1


def remedies(findings: Sequence[Finding]) -> list[Finding]:
    """Those with a remedy: errors, then warnings, then notes, and among equals in the order in which they were
    found.
    """
    return sorted((finding for finding in findings if finding.remedy), key=lambda finding: GRAVITY.index(finding.state))


def examine(device: str = "auto", data_dir: Path | None = None, quick: bool = False) -> list[Finding]:
    """All findings, in the order of what matters."""
    python, library = check_python(sys.version_info[:3]), check_torch(*machine.torch_at_hand())
    if library.state == "error":
        return [python, library]
    import torch

    from fastcifar.device import resolve_device

    findings = [
        python,
        library,
        check_driver(machine.driver_version(), torch.cuda.device_count(), torch.version.cuda, machine.cuda_failure()),
    ]
    findings += [card_of(index, device) for index in range(torch.cuda.device_count())]
    try:
        chosen = resolve_device(device)
    except ConfigError as error:
        return [*findings, from_sentence("device", "error", str(error))]
    return [
        *findings,
        precision_of(chosen),
        check_kernels(machine.kernel_obstacle(chosen), chosen.type == "cuda"),
        dali_of(chosen),
        check_compile(None if quick else machine.compile_obstacle(chosen), tried=not quick),
        check_data(data_dir, machine.answers),
        memory_of(chosen),
        check_disk(Path.cwd(), shutil.disk_usage(Path.cwd()).free, os.access(Path.cwd(), os.W_OK)),
        check_threads(torch.get_num_threads(), machine.usable_cpus()),
    ]


def from_sentence(name: str, state: State, sentence: str) -> Finding:
    """A finding from an error's sentence, which ends in what to do."""
    text, _, remedy = sentence.rstrip(".").partition("; ")
    return Finding(name, state, text, remedy or None)


def check_python(version: tuple[int, ...]) -> Finding:
    text, (oldest, newest) = ".".join(map(str, version)), PYTHONS
    if oldest <= version[:2] <= newest:
        return Finding("python", "ok", text)
    low, high = (".".join(map(str, bound)) for bound in PYTHONS)
    return Finding("python", "warning", f"{text}, for which fastcifar is not tested", f"install Python {low} to {high}")


def check_torch(version: str | None, cuda: str | None, failure: str = "") -> Finding:
    oldest = ".".join(map(str, OLDEST_TORCH))
    if version is None:
        return Finding(
            "torch", "error", f"cannot be imported ({failure})", f"pip install 'torch>={oldest}' torchvision"
        )
    text = f"{version}, built {f'for CUDA {cuda}' if cuda else 'without CUDA'}"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
        return Finding(
            "torch",
            "warning",
            f"{text}; fastcifar is made for {oldest} or later",
            f"pip install --upgrade 'torch>={oldest}'",
        )
    return Finding("torch", "ok", text)


def check_driver(driver: str | None, cards: int, cuda: str | None, failure: str) -> Finding:
    """Given NVIDIA's driver, the cards that torch sees, the CUDA version it was built for, and why it cannot use it."""
    if cards:
        return Finding("driver", "ok", driver or "present")
    if driver is None:
        return Finding("driver", "note", "none of NVIDIA's was found: the CPU trains")
    if cuda is None:
        remedy = "install torch with CUDA, which is what a plain pip install --force-reinstall torch brings on Linux"
        return Finding(
            "driver", "warning", f"{driver}, but torch is built without CUDA, so that the cards lie idle", remedy
        )
    oldest = OLDEST_DRIVERS.get(cuda.split(".")[0])
    update = f"update the driver to {oldest} or later" if oldest else "update the driver"
    reason = f"{driver}, but torch finds no card it can use{f' ({failure})' if failure else ''}"
    return Finding(
        "driver",
        "warning",
        reason,
        f"{update}, or install a torch built for an older CUDA; see CUDA_VISIBLE_DEVICES too",
    )


def card_of(index: int, device: str) -> Finding:
    """The finding on card `index`, where `device` is what a run would be given."""
    import torch

    properties, chosen = torch.cuda.get_device_properties(index), {"cpu": None, "auto": 0, "cuda": 0}
    wanted = chosen[device] if device in chosen else int(device.split(":")[1])
    free, total = torch.cuda.mem_get_info(index)
    capability = (properties.major, properties.minor)
    return check_card(index, properties.name, capability, torch.cuda.get_arch_list(), free, total, index == wanted)


def check_card(
    index: int, name: str, capability: tuple[int, int], built: Sequence[str], free: int, total: int, chosen: bool
) -> Finding:
    """Given what torch is built for (sm_90, compute_120), the bytes free and in all, and whether it is the card that
    would train.
    """
    text = f"{name}, sm_{capability[0]}{capability[1]}, {size(free)} of {size(total)} free"
    if machine.runs_on(capability, built):
        return Finding(f"cuda:{index}", "ok", text)
    remedy = "install a torch that is built for it" + (", or train with --device cpu" if chosen else "")
    return Finding(
        f"cuda:{index}", "error" if chosen else "warning", f"{text}; torch is built for {' '.join(built)} alone", remedy
    )


def precision_of(device: torch.device) -> Finding:
    from fastcifar.device import native_bf16, resolve_precision

    return check_precision(native_bf16(device), resolve_precision("auto", device)[0].name, str(device))


def check_precision(native: bool, chosen: str, device: str) -> Finding:
    text = f"{chosen} on {device}, which has {'' if native else 'no '}native bfloat16"
    return Finding("precision", "ok" if native else "note", text)


def check_kernels(obstacle: str | None, on_gpu: bool) -> Finding:
    if obstacle is None:
        return Finding(
            "kernels", "ok", "run with Triton" if on_gpu else "run as plain torch, which is what they are on a CPU"
        )
    changes = {"switched": "unset FASTCIFAR_KERNELS", "Triton": "pip install triton (on Windows, triton-windows)"}
    remedy = next((change for start, change in changes.items() if obstacle.startswith(start)), None)
    if remedy is None and "older" not in obstacle:
        remedy = "install a C compiler, such as gcc, which Triton needs, and a Triton that belongs to this torch"
    return Finding("kernels", "warning", f"ops run as plain torch: {obstacle}", remedy)


def dali_of(device: torch.device) -> Finding:
    from fastcifar.data.loader import dali_installed

    if not dali_installed():
        return check_dali(False, None, device.type == "cuda")
    from fastcifar.augment.dali_apply import why_unusable

    return check_dali(True, why_unusable(device), device.type == "cuda")


def check_dali(installed: bool, obstacle: str | None, on_gpu: bool) -> Finding:
    """Given why a small pipeline failed; it is on a GPU that DALI feeds the network."""
    if installed and obstacle is None:
        return Finding("dali", "ok", "works" if on_gpu else "works; on a CPU torch augments, which is faster there")
    text = f"fails: {obstacle}" if installed else "not installed"
    if not on_gpu:
        return Finding("dali", "note", f"{text}; on a CPU torch augments in any case")
    package = "nvidia-dali-cuda130" if platform.system() == "Linux" else None
    remedy = f"pip install --upgrade {package}" if package else None
    return Finding("dali", "warning" if package else "note", f"{text}; torch augments in its place", remedy)


def check_compile(obstacle: str | None, tried: bool = True) -> Finding:
    if not tried:
        return Finding("compile", "note", "not tried")
    if obstacle is None:
        return Finding("compile", "ok", "torch.compile works")
    compilers = {"Linux": "g++ and gcc, as in apt install build-essential", "Darwin": "xcode-select --install"}
    remedy = f"install a C++ compiler ({compilers.get(platform.system(), 'the Build Tools for Visual Studio')})"
    return Finding("compile", "warning", f"torch.compile fails, so that steps run uncompiled: {obstacle}", remedy)


def check_data(data_dir: Path | None, reachable: Callable[[str], bool]) -> Finding:
    """Where CIFAR-10 is, every file being read and checked, or whether it could be fetched."""
    from fastcifar.data import sources

    try:
        place = sources.find("cifar10", data_dir)
        if place is not None:
            for split in ("train", "test"):
                sources.load_dataset("cifar10", split, data_dir, download=False)
            return Finding("data", "ok", f"CIFAR-10 at {place}, every file whole")
    except DataError as error:
        return from_sentence("data", "error", str(error))
    form, folder = sources.cifar_form("cifar10"), data_dir or sources.cache_folder()
    for address in sources.addresses(form):
        if reachable(address):
            return Finding(
                "data", "note", f"CIFAR-10 is not at hand; training would fetch it from {address} into {folder}"
            )
    by_hand = (
        f"put {form.archive} into {folder} or a folder that FASTCIFAR_DATA names, or train with --dataset synthetic"
    )
    return Finding("data", "error", "CIFAR-10 is not at hand, and no address of it answers", by_hand)


def memory_of(device: torch.device) -> Finding:
    from fastcifar.device import resolve_precision

    precision, _ = resolve_precision(MAIN_JOB.engine.precision, device)
    return check_memory(memory_limit(MAIN_JOB.engine, device), device, precision.dtype.itemsize)


def check_memory(limit: int | None, device: torch.device, value_bytes: int) -> Finding:
    """Whether the main job fits into `limit` bytes on `device`."""
    from fastcifar.diagnostics.plan import data_size

    if limit is None:
        return Finding("memory", "note", "this system does not tell how much is free")
    there = f"{size(limit)} for a run on {device}"
    try:
        plan = lay_out(MAIN_JOB, footprint(MAIN_JOB, data_size(MAIN_JOB.data), device, value_bytes), limit)
    except ConfigError as error:
        where = (
            "close what else uses it" if device.type == "cpu" else "close what else uses the card (nvidia-smi lists it)"
        )
        return Finding("memory", "error", f"{there}: {str(error).split('; ')[0]}", where)
    return Finding("memory", "ok", f"{there}; {MAIN_JOB.model.arch} takes about {size(plan.needed)}, {plan.manner}")


def check_disk(folder: Path, free: int, writable: bool) -> Finding:
    """Given the folder that runs are written under."""
    if not writable:
        return Finding(
            "disk", "error", f"{folder} cannot be written", "change to a folder of your own, or give one with --out"
        )
    if free < FREE_DISK:
        return Finding(
            "disk",
            "warning",
            f"{size(free)} free in {folder}",
            f"make room for {size(FREE_DISK)}, or give --out elsewhere",
        )
    return Finding("disk", "ok", f"{size(free)} free in {folder}")


def check_threads(threads: int, cpus: int) -> Finding:
    text = f"{threads} on {cpus} CPU{'s' if cpus > 1 else ''}"
    if threads > cpus:
        return Finding("threads", "warning", f"{text}, where they wait for each other", f"train with --threads {cpus}")
    return Finding("threads", "ok", text)
