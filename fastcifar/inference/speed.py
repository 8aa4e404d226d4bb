"""How fast a network classifies, by batch size."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from fastcifar.device import synchronize
from fastcifar.inference import TTA
from fastcifar.inference.classifier import Classifier

SIZES = {"cpu": (1, 8, 32, 128), "cuda": (1, 8, 32, 128, 512, 2048)}
SECONDS = 0.5
"""Measured for each batch size, after the warm-up."""
WARM_UP, FEWEST = 2, 3
"""Calls before the clock starts, and the fewest under it."""


@dataclass(frozen=True)
class Speed:
    """The time from bytes on the device to logits on the device, as plain calls that are waited for one by one."""

    batch_size: int
    latency_seconds: float
    """Median of a call."""
    images_per_second: float


def measure_speed(classifier: Classifier, tta: TTA = "none") -> tuple[Speed, ...]:
    """Latency and throughput of random images, for each of `SIZES`."""
    return tuple(measure(classifier, size, tta) for size in SIZES[classifier.device.type])


def measure(classifier: Classifier, batch_size: int, tta: TTA) -> Speed:
    side, device = classifier.image_size, classifier.device
    images = torch.randint(0, 256, (batch_size, side, side, 3), dtype=torch.uint8).to(device)
    for _ in range(WARM_UP):
        classifier(images, tta)
    synchronize(device)
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < FEWEST or time.perf_counter() < end:
        start = time.perf_counter()
        classifier(images, tta)
        synchronize(device)
        times.append(time.perf_counter() - start)
    latency = statistics.median(times)
    return Speed(batch_size, latency, batch_size / latency)
