"""A training epoch of resnet20_v2: fastcifar against the script that a user would write, at the same batch size."""

from __future__ import annotations

import copy

import pytest
import torch
from test_input_pipeline import pil
from timing import measure
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fastcifar.config import EngineConfig, ModelConfig, RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.device import keep_freed_memory, matmul_flops_per_second
from fastcifar.engine.setup import resolve
from fastcifar.engine.trainer import Trainer
from fastcifar.models import build_model
from fastcifar.models.count import count_network

ARCH, BATCH_SIZE, COUNT = "resnet20_v2", 128, 5_120
plain_rate: dict[str, float] = {}


@pytest.mark.benchmark(group=f"training epoch, {ARCH}, batch {BATCH_SIZE}")
def test_plain_script(benchmark, images, device):
    """float32, NCHW, eager, PIL transforms in a DataLoader with two workers, torch's SGD and cosine."""
    model = build_model(ARCH).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    dataset = pil(images, "standard", COUNT)
    loader = DataLoader(
        dataset, BATCH_SIZE, shuffle=True, num_workers=2, persistent_workers=True, pin_memory=device.type == "cuda"
    )

    def epoch() -> None:
        for batch, labels in loader:
            loss = F.cross_entropy(model(batch.to(device, non_blocking=True)), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    plain_rate[ARCH] = COUNT / measure(benchmark, epoch, device, rounds=3)
    benchmark.extra_info.update(images_per_second=plain_rate[ARCH])


@pytest.mark.benchmark(group=f"training epoch, {ARCH}, batch {BATCH_SIZE}")
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_fastcifar(benchmark, images, device, compiled):
    if device.type == "cpu":
        keep_freed_memory()
    config, _ = resolve(
        RunConfig(model=ModelConfig(ARCH), engine=EngineConfig(compile=compiled), batch_size=BATCH_SIZE, epochs=100)
    )
    few = ImageSet(images.images[:COUNT], images.labels[:COUNT], images.classes, images.mean, images.std)
    trainer = Trainer(config, few)
    trainer.compile()
    median = measure(benchmark, trainer.run_epoch, device, rounds=5)
    rate = COUNT / median
    seconds = copy.copy(trainer.clock.seconds)
    benchmark.extra_info.update(
        images_per_second=rate,
        precision=config.engine.precision,
        times_plain_script=rate / plain_rate[ARCH] if plain_rate else None,
        share_of_matrix_product_rate=rate
        * count_network(ARCH).training_flops
        / matmul_flops_per_second(device, trainer.precision.dtype),
        share_of_time_loading=seconds["load"] / (seconds["load"] + seconds["train"]),
    )
