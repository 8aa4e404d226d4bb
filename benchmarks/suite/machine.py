"""What the figures are of."""

from __future__ import annotations

import platform

import torch

from fastcifar.diagnostics.machine import driver_version, usable_cpus
from fastcifar.engine.host import processor_name
from suite.records import Machine


def this_machine(device: str) -> Machine:
    """The machine at hand, with its GPU where `device` is not the CPU."""
    on_gpu = device != "cpu"
    card = torch.cuda.get_device_properties(device) if on_gpu else None
    return Machine(
        gpu=card.name if card else None,
        capability=f"{card.major}.{card.minor}" if card else None,
        memory_bytes=card.total_memory if card else None,
        driver=driver_version() if card else None,
        cuda=torch.version.cuda if card else None,
        cudnn=torch.backends.cudnn.version() if card else None,
        cpu=processor_name(),
        cores=usable_cpus(),
        system=platform.system(),
    )
