"""`fastcifar doctor`: what training would use of this machine, what hinders it, and what to install or change."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from fastcifar.config import RunConfig
from fastcifar.diagnostics import machine
from fastcifar.engine.memory import footprint, lay_out, memory_limit, passes_in_words, size
from fastcifar.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

State = Literal["ok", "note", "warning", "error"]
GRAVITY: tuple[State, ...] = ("error", "warning", "note", "ok")

MAIN_JOB = RunConfig()
"""The configuration of `fastcifar train --arch resnet_prop`."""
OLDEST_DRIVERS = {"12": "525", "13": "580"}
"""The oldest driver for each CUDA version of torch, from NVIDIA's release notes."""
FREE_DISK = 2 * 2**30
"""Most bytes that a run with its checkpoints and a download takes."""
COMPILERS = {"Linux": "g++ and gcc, as in apt install build-essential", "Darwin": "xcode-select --install"}
MESSAGES: dict[str, tuple[State, str]] = {
    "python": ("ok", "{version}"),
    "torch": ("ok", "{version}, built for CUDA {cuda}"),
    "torch_for_cpu": ("ok", "{version}, built without CUDA"),
    "torch_absent": ("error", "cannot be imported ({error})"),
    "driver": ("ok", "{version}"),
    "driver_absent": ("note", "none of NVIDIA's was found: the CPU trains"),
    "driver_without_cuda": ("warning", "{version}, but torch is built without CUDA, so that the cards lie idle"),
    "driver_unusable": ("warning", "{version}, but torch finds no card it can use ({error})"),
    "card": ("ok", "{card}"),
    "card_unsupported": ("error", "{card}; torch is built for {built} alone"),
    "other_card_unsupported": ("warning", "{card}; torch is built for {built} alone"),
    "device_absent": ("error", "{problem}"),
    "bf16_native": ("ok", "{precision} on {device}, which has native bfloat16"),
    "bf16_absent": ("note", "{precision} on {device}, which has no native bfloat16"),
    "kernels_on_gpu": ("ok", "run with Triton"),
    "kernels_on_cpu": ("ok", "run as plain torch, which is what they are on a CPU"),
    "kernels_switched_off": ("warning", "ops run as plain torch: switched off by FASTCIFAR_KERNELS"),
    "triton_absent": ("warning", "ops run as plain torch: Triton is not installed"),
    "card_too_old": ("warning", "ops run as plain torch: the card is older than sm_75"),
    "kernel_failed": ("warning", "ops run as plain torch: a test of one failed: {error}"),
    "dali": ("ok", "works"),
    "dali_on_cpu": ("ok", "works; on a CPU torch augments, which is faster there"),
    "dali_absent": ("warning", "not installed; torch augments in its place"),
    "dali_failed": ("warning", "fails: {error}; torch augments in its place"),
    "dali_absent_unneeded": ("note", "not installed; torch augments here in any case"),
    "dali_failed_unneeded": ("note", "fails: {error}; torch augments here in any case"),
    "compiler": ("ok", "torch.compile works"),
    "compiler_untried": ("note", "not tried"),
    "compiler_failed": ("warning", "torch.compile fails, so that steps run uncompiled: {error}"),
    "data": ("ok", "CIFAR-10 at {place}, every file whole"),
    "data_to_fetch": ("note", "{absence}; training would fetch it from {address} into {folder}"),
    "data_unreachable": ("error", "{absence}, and no address of it answers"),
    "data_damaged": ("error", "{problem}"),
    "memory": ("ok", "{limit} for a run on {device}; {arch} takes about {needed}, {manner}"),
    "memory_unknown": ("note", "this system does not tell how much is free"),
    "memory_low": ("error", "{limit} for a run on {device}: {problem}"),
    "card_memory_low": ("error", "{limit} for a run on {device}: {problem}"),
    "disk": ("ok", "{free} free in {folder}"),
    "disk_low": ("warning", "{free} free in {folder}"),
    "disk_unwritable": ("error", "{folder} cannot be written"),
    "threads": ("ok", "{threads} on {cpus} CPUs"),
    "threads_too_many": ("warning", "{threads} on {cpus} CPUs, where they wait for each other"),
}
"""The state and the text of each code. An error prevents the main job; a warning slows it down."""
REMEDIES = {
    "torch_absent": "pip install --force-reinstall torch torchvision",
    "driver_without_cuda": "install torch with CUDA (on Linux, pip install --force-reinstall torch)",
    "driver_unusable": "update the driver to {oldest} or later, or install a torch built for an older CUDA; see "
    "CUDA_VISIBLE_DEVICES too",
    "card_unsupported": "install a torch that is built for it, or train with --device cpu",
    "other_card_unsupported": "install a torch that is built for it",
    "device_absent": "{remedy}",
    "kernels_switched_off": "unset FASTCIFAR_KERNELS",
    "triton_absent": "pip install triton (on Windows, triton-windows)",
    "kernel_failed": "install a C compiler, such as gcc, which Triton needs, and a Triton that belongs to this torch",
    "dali_absent": "pip install --upgrade nvidia-dali-cuda130",
    "dali_failed": "pip install --upgrade nvidia-dali-cuda130",
    "compiler_failed": "install a C++ compiler ({compiler})",
    "data_unreachable": "put {archive} into {folder} or where FASTCIFAR_DATA points, or train with --dataset synthetic",
    "data_damaged": "{remedy}",
    "memory_low": "close what else uses it",
    "card_memory_low": "close what else uses the card (nvidia-smi lists it)",
    "disk_low": "make room for {needed}, or give --out elsewhere",
    "disk_unwritable": "change to a folder of your own, or give one with --out",
    "threads_too_many": "train with --threads {cpus}",
}
"""What to install or change, by code."""


class Finding:
    """A finding on one subject: a code of `MESSAGES`, and the values in its text and its remedy."""

    def __init__(self, subject: str, code: str, **values: object) -> None:
        self.subject, self.code, self.values = subject, code, values

    @property
    def state(self) -> State:
        return MESSAGES[self.code][0]

    @property
    def text(self) -> str:
        return MESSAGES[self.code][1].format(**self.values)

    @property
    def remedy(self) -> str | None:
        return REMEDIES.get(self.code, "").format(**self.values) or None


def diagnose(device: str, data_dir: Path | None, *, quick: bool) -> int:
    """Prints the findings, then the remedies, most important first; returns 1 where the main job could not run, else 0.

    `quick` leaves out the trial of the compiler, which takes some seconds.
    """
    findings, console = examine(device, data_dir, quick), Console(highlight=False, soft_wrap=True)
    for finding in findings:
        style = "bold" if finding.remedy else None
        console.print(f"{finding.state:8}{finding.subject:10}{finding.text}", markup=False, style=style)
    problems = remedies(findings)
    if problems:
        console.print("\nTo install or change, most important first:")
    for number, finding in enumerate(problems, start=1):
        console.print(f"{number:3}. {finding.subject}: {finding.remedy}.", markup=False)
    impossible = any(finding.state == "error" for finding in findings)
    can = "cannot" if impossible else "can"
    console.print(f"\nfastcifar train --arch {MAIN_JOB.model.arch} {can} run here.", style="bold")
    return int(impossible)


def remedies(findings: Sequence[Finding]) -> list[Finding]:
    """The findings with a remedy, the gravest first, otherwise in their given order."""
    return sorted((finding for finding in findings if finding.remedy), key=lambda finding: GRAVITY.index(finding.state))


def examine(device: str, data_dir: Path | None = None, quick: bool = False) -> list[Finding]:
    """Returns all findings, in order of importance."""
    python, library = (
        Finding("python", "python", version=platform.python_version()),
        check_torch(*machine.torch_at_hand()),
    )
    if library.state == "error":
        return [python, library]
    import torch

    from fastcifar.device import native_bf16, resolve_device, resolve_precision

    findings = [
        python,
        library,
        check_driver(machine.driver_version(), torch.cuda.device_count(), torch.version.cuda, machine.cuda_failure()),
    ]
    findings += [card_of(index, device) for index in range(torch.cuda.device_count())]
    try:
        chosen = resolve_device(device)
    except ConfigError as error:
        return [*findings, Finding("device", "device_absent", **parts_of(error))]
    on_gpu = chosen.type == "cuda"
    return [
        *findings,
        check_precision(native_bf16(chosen), resolve_precision("auto", chosen).name, str(chosen)),
        check_kernels(machine.kernel_obstacle(chosen), on_gpu),
        check_dali(machine.dali_obstacle(chosen), on_gpu),
        Finding("compile", "compiler_untried") if quick else check_compiler(machine.compile_obstacle(chosen)),
        check_data(data_dir, machine.answers),
        memory_of(chosen),
        check_disk(Path.cwd(), shutil.disk_usage(Path.cwd()).free, os.access(Path.cwd(), os.W_OK)),
        check_threads(torch.get_num_threads(), machine.usable_cpus()),
    ]


def parts_of(error: Exception) -> dict[str, str]:
    """Splits an error's sentence into the problem and the remedy at its end."""
    problem, _, remedy = str(error).rstrip(".").partition("; ")
    return {"problem": problem, "remedy": remedy}


def check_torch(version: str | None, cuda: str | None, error: str = "") -> Finding:
    if version is None:
        return Finding("torch", "torch_absent", error=error)
    return Finding("torch", "torch" if cuda else "torch_for_cpu", version=version, cuda=cuda)


def check_driver(version: str | None, cards: int, cuda: str | None, error: str) -> Finding:
    """Checks NVIDIA's driver, given the cards that torch sees, torch's CUDA version, and why it cannot use it."""
    if cards:
        return Finding("driver", "driver", version=version or "present")
    if version is None:
        return Finding("driver", "driver_absent")
    if cuda is None:
        return Finding("driver", "driver_without_cuda", version=version)
    oldest = OLDEST_DRIVERS.get(cuda.split(".")[0], OLDEST_DRIVERS["13"])
    return Finding("driver", "driver_unusable", version=version, error=error, oldest=oldest)


def card_of(index: int, device: str) -> Finding:
    """The finding on card `index`; `device` is that of a run."""
    import torch

    properties, chosen = torch.cuda.get_device_properties(index), {"cpu": None, "auto": 0, "cuda": 0}
    wanted = chosen[device] if device in chosen else int(device.split(":")[1])
    free, total = torch.cuda.mem_get_info(index)
    capability = (properties.major, properties.minor)
    return check_card(index, properties.name, capability, torch.cuda.get_arch_list(), free, total, index == wanted)


def check_card(
    index: int, name: str, capability: tuple[int, int], built: Sequence[str], free: int, total: int, chosen: bool
) -> Finding:
    """Checks a card, given torch's targets (sm_90, compute_120), bytes free and in all, and whether runs use it."""
    unsupported = "card_unsupported" if chosen else "other_card_unsupported"
    code = "card" if machine.runs_on(capability, built) else unsupported
    card = f"{name}, sm_{capability[0]}{capability[1]}, {size(free)} of {size(total)} free"
    return Finding(f"cuda:{index}", code, card=card, built=" ".join(built))


def check_precision(native: bool, chosen: str, device: str) -> Finding:
    return Finding("precision", "bf16_native" if native else "bf16_absent", precision=chosen, device=device)


def check_kernels(obstacle: tuple[machine.KernelObstacle, str] | None, on_gpu: bool) -> Finding:
    if obstacle is None:
        return Finding("kernels", "kernels_on_gpu" if on_gpu else "kernels_on_cpu")
    return Finding("kernels", obstacle[0], error=obstacle[1])


def check_dali(obstacle: tuple[str, str] | None, on_gpu: bool) -> Finding:
    """The finding on DALI, which is used only on a GPU and exists only for Linux."""
    if obstacle is None:
        return Finding("dali", "dali" if on_gpu else "dali_on_cpu")
    needed = on_gpu and platform.system() == "Linux"
    return Finding("dali", f"dali_{obstacle[0]}{'' if needed else '_unneeded'}", error=obstacle[1])


def check_compiler(error: str | None) -> Finding:
    if error is None:
        return Finding("compile", "compiler")
    compiler = COMPILERS.get(platform.system(), "the Build Tools for Visual Studio")
    return Finding("compile", "compiler_failed", error=error, compiler=compiler)


def check_data(data_dir: Path | None, reachable: Callable[[str], bool]) -> Finding:
    """Checks where CIFAR-10 is, reading and verifying every file, or whether it could be fetched."""
    from fastcifar.data import sources

    try:
        place = sources.find("cifar10", data_dir)
        if place is not None:
            for split in ("train", "test"):
                sources.load_dataset("cifar10", split, data_dir, download=False)
            return Finding("data", "data", place=place)
    except DataError as error:
        return Finding("data", "data_damaged", **parts_of(error))
    form, folder = sources.cifar_form("cifar10"), sources.cache_folder()
    absence = sources.absence(form, data_dir)
    for address in sources.addresses(form):
        if reachable(address):
            return Finding("data", "data_to_fetch", absence=absence, address=address, folder=folder)
    return Finding("data", "data_unreachable", absence=absence, archive=form.archive, folder=folder)


def memory_of(device: torch.device) -> Finding:
    from fastcifar.device import resolve_precision

    precision = resolve_precision(MAIN_JOB.engine.precision, device)
    return check_memory(memory_limit(MAIN_JOB.engine, device), device, precision.dtype.itemsize)


def check_memory(limit: int | None, device: torch.device, value_bytes: int) -> Finding:
    """Checks whether the main job fits into `limit` bytes on `device`."""
    from fastcifar.diagnostics.plan import data_size

    if limit is None:
        return Finding("memory", "memory_unknown")
    there = {"limit": size(limit), "device": device}
    try:
        plan = lay_out(MAIN_JOB, footprint(MAIN_JOB, data_size(MAIN_JOB.data), device, value_bytes), limit)
    except ConfigError as error:
        code = "memory_low" if device.type == "cpu" else "card_memory_low"
        return Finding("memory", code, **there, problem=parts_of(error)["problem"])
    return Finding(
        "memory", "memory", **there, arch=MAIN_JOB.model.arch, needed=size(plan.needed), manner=passes_in_words(plan)
    )


def check_disk(folder: Path, free: int, writable: bool) -> Finding:
    code = "disk_unwritable" if not writable else "disk_low" if free < FREE_DISK else "disk"
    return Finding("disk", code, folder=folder, free=size(free), needed=size(FREE_DISK))


def check_threads(threads: int, cpus: int) -> Finding:
    return Finding("threads", "threads_too_many" if threads > cpus else "threads", threads=threads, cpus=cpus)
