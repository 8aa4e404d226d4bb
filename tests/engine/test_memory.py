"""Memory plans: for every size of memory the parts are those of closed forms, fit, and leave no room for more."""

import functools
import math
from dataclasses import replace

import pytest
import torch

from fastcifar import device as machine
from fastcifar.config import AverageConfig, DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from fastcifar.engine.memory import (
    CONTEXT_BYTES,
    DataSize,
    MemoryPlan,
    divisors,
    fit_to_memory,
    footprint,
    halved,
    limit_memory,
    memory_limit,
    plan_in_words,
    values_per_weight,
)
from fastcifar.errors import ConfigError
from fastcifar.models import build_model
from fastcifar.models.count import NetworkCount, count_network
from fastcifar.optim import OPTIMIZERS
from fastcifar.optim.optimizers import build_optimizer

GB, MB = 2**30, 2**20
CIFAR = DataSize(50_000, 10_000)
CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
NETWORKS = {
    "resnet_prop": (11_172_170, 2_235_392, 64 * 32 * 32),
    "resnetrs50": (26_115_738, 1_244_000, 64 * 16 * 16),
    "wrn28_10": (36_479_194, 9_248_000, 160 * 32 * 32),
}
"""By network, parameters, activation bytes an image in bfloat16 (`fastcifar count`), values of the largest map."""
PLANS = {
    ("resnet_prop", 128): {6: (128, 1000), 8: (128, 2000), 11: (128, 2000), 24: (128, 2000)},
    ("resnet_prop", 2048): {6: (1024, 1000), 8: (1024, 2000), 11: (2048, 2000), 24: (2048, 2000)},
    ("resnetrs50", 128): {6: (128, 2000), 8: (128, 2000), 11: (128, 2000), 24: (128, 2000)},
    ("resnetrs50", 8192): {6: (2048, 2000), 8: (4096, 2000), 11: (4096, 2000), 24: (8192, 2000)},
    ("wrn28_10", 128): {6: (128, 500), 8: (128, 500), 11: (128, 1000), 24: (128, 2000)},
    ("wrn28_10", 512): {6: (256, 500), 8: (256, 500), 11: (512, 1000), 24: (512, 2000)},
    ("wrn28_10", 2048): {6: (256, 500), 8: (256, 500), 11: (512, 1000), 24: (1024, 2000)},
}
"""Micro batch and evaluation batch by network and batch size, then by a card's GB."""


def run(arch: str = "resnet_prop", batch_size: int = 128, **parts: object) -> RunConfig:
    return RunConfig(model=ModelConfig(arch), batch_size=batch_size, **parts)


@functools.cache
def counted(arch: str) -> NetworkCount:
    return count_network(arch, classes=10, image_size=32)


def fit(config: RunConfig, device: torch.device, limit: int | None, **options: object) -> tuple[RunConfig, MemoryPlan]:
    data = options.pop("data", CIFAR)
    count = counted(config.model.arch) if data is CIFAR and not config.model.options else None
    return fit_to_memory(config, footprint(config, data, device, **options, count=count), limit)


def plan_memory(config: RunConfig, limit: int, **options: object) -> MemoryPlan:
    return fit(config, CARD, limit, **options)[1]


@pytest.mark.parametrize(("arch", "batch_size"), PLANS, ids=str)
def test_plans_of_the_usual_cards_are_those_of_closed_forms(arch, batch_size):
    parameters, activations, largest = NETWORKS[arch]
    for gigabytes, (micro_batch, evaluation_batch) in PLANS[arch, batch_size].items():
        limit = gigabytes * GB
        plan = plan_memory(run(arch, batch_size), limit)
        assert (plan.micro_batch, plan.evaluation_batch, plan.chunk_size) == (micro_batch, evaluation_batch, 8192)
        parts = plan.parts
        assert parts["data set"] == 60_000 * (3072 + 8)
        assert parts["gradients"] == parts["optimiser"] == 4 * parameters
        assert parts["weights"] == parts["averages"]
        assert 0 <= parts["weights"] - 4 * parameters < 0.01 * parts["weights"]
        assert parts["weights in low precision"] == 2 * parameters
        assert parts["images under augmentation"] == 8192 * 3072 * 16
        assert parts["evaluation"] == evaluation_batch * 4 * 2 * largest <= limit / 8
        assert evaluation_batch == 2000 or 2 * parts["evaluation"] > limit / 8
        image = parts["activations"] / micro_batch
        assert image == pytest.approx(activations + 4 * 2 * largest, rel=1e-3)
        assert parts["CUDA and its libraries"] == 600 * MB
        assert plan.needed == sum(parts.values()) <= 0.9 * limit
        assert micro_batch == batch_size or plan.needed + micro_batch * image > 0.9 * limit, "twice as many would fit"
        assert plan.passes == batch_size // micro_batch


def test_batches_are_split_into_equal_parts():
    plan = plan_memory(run("wrn28_10", 3 * 7 * 31), 6 * GB)
    assert (plan.micro_batch, plan.passes) == (217, 3)
    assert "in 3 passes of 217, with batch norm statistics of each pass" in plan_in_words(plan)
    assert divisors(12) == [12, 6, 4, 3, 2, 1]
    assert [halved(2000, most) for most in (5000, 2000, 1999, 300, 1, 0)] == [2000, 2000, 1000, 250, 1, 1]


def test_what_is_asked_for_is_kept():
    config = run("resnet_prop", 100, engine=EngineConfig(micro_batch=30), data=DataConfig(chunk_size=500))
    plan = plan_memory(config, 6 * GB)
    assert (plan.micro_batch, plan.passes, plan.chunk_size) == (30, 4, 500)
    assert plan_memory(replace(config, engine=EngineConfig(micro_batch=999)), 6 * GB).micro_batch == 100


def test_everything_that_is_kept_counts():
    plain = plan_memory(run(), 6 * GB).parts
    config = run(
        optim=OptimConfig("adamw", sharpness="sam"),
        average=AverageConfig((0.9, 0.99), "50%"),
        data=DataConfig(val_split=5000),
    )
    parts = plan_memory(config, 6 * GB, value_bytes=4).parts
    assert parts["averages"] == 3 * plain["weights"]
    assert parts["best weights"] == 4 * plain["weights"]
    assert parts["weights that SAM returns to"] == plain["weights"]
    assert 2 * plain["optimiser"] <= parts["optimiser"] <= 2 * plain["optimiser"] + 8 * 200
    assert parts["activations"] == 2 * plain["activations"]
    assert parts["weights in low precision"] == 0


def test_larger_images_come_in_smaller_chunks():
    plan = plan_memory(run(), 6 * GB, data=DataSize(5000, 1000, 10, 96))
    assert plan.chunk_size == 512
    assert plan.parts["images under augmentation"] == 512 * 3 * 96 * 96 * 16
    assert 2 * plan.parts["images under augmentation"] > 6 * GB / 16


@pytest.mark.parametrize("engine", [EngineConfig(), EngineConfig(micro_batch=64)], ids=["any", "asked for"])
def test_what_does_not_fit_is_refused(engine):
    with pytest.raises(
        ConfigError, match=r"wrn28_10 with \d+ images? a pass needs about [\d.,]+ .iB, and there are 1\.00 GiB; choose"
    ):
        plan_memory(run("wrn28_10", engine=engine), GB)


def test_a_run_on_a_cpu_is_laid_out_for_what_is_free():
    config, (_, activations, largest) = run("wrn28_10", 512), NETWORKS["wrn28_10"]
    whole, plan = fit(config, CPU, 24 * GB)
    assert (whole.engine.micro_batch, whole.data.chunk_size, plan.evaluation_batch) == (512, 1024, 250)
    parts = plan.parts
    assert parts["activations"] == pytest.approx(512 * 1.5 * (activations + 4 * 2 * largest), rel=1e-3)
    assert parts["evaluation"] == pytest.approx(250 * 1.5 * 4 * 2 * largest, rel=1e-3)
    assert parts["copies for a checkpoint"] == 4 * parts["weights"]
    assert parts["Python and its libraries"] == 1050 * MB
    assert "CUDA and its libraries" not in parts
    split, plan = fit(config, CPU, 6 * GB)
    assert (split.engine.micro_batch, split.data.chunk_size, plan.passes) == (128, 1024, 4)
    assert plan.needed <= 0.9 * 6 * GB < plan.needed + 128 * parts["activations"] / 512
    anywhere, plan = fit(config, CPU, None)
    assert (anywhere.engine.micro_batch, anywhere.data.chunk_size, plan) == (512, 1024, None)


def test_the_limit_is_what_is_given_or_else_free(monkeypatch):
    monkeypatch.setattr(machine, "own_memory", lambda: GB)
    monkeypatch.setattr(machine, "free_memory", lambda device: 5 * GB)
    assert memory_limit(EngineConfig(), CPU) == 6 * GB
    assert memory_limit(EngineConfig(), CARD) == 5 * GB + CONTEXT_BYTES
    assert memory_limit(EngineConfig(memory_limit="2GB"), CPU) == 2 * GB
    monkeypatch.setattr(machine, "free_memory", lambda device: None)
    assert memory_limit(EngineConfig(), CPU) is None


def test_an_evaluation_on_a_cpu_is_whole_where_the_rest_leaves_room():
    """Otherwise the free memory, which changes, would decide the last digits of a loss."""
    config = run("wrn28_10", 8, engine=EngineConfig(compile="off"))
    image = 1.5 * 4 * 2 * NETWORKS["wrn28_10"][2]
    needed = fit(config, CPU, 24 * GB)[1].needed
    for limit, images in ((math.ceil(needed / 0.9) + MB, 250), (math.ceil(needed / 0.9) - MB, 125)):
        plan = fit(config, CPU, limit)[1]
        assert (plan.passes, plan.evaluation_batch) == (1, images)
        assert plan.parts["evaluation"] == pytest.approx(images * image, rel=1e-3)


def test_no_network_is_too_large_to_be_refused():
    config = replace(run(), model=ModelConfig("resnet", channels=(100_000,), blocks=(1,)))
    before = machine.peak_memory_bytes(CPU)
    with pytest.raises(ConfigError, match="resnet with 1 image a pass needs about"):
        fit(config, CPU, 24 * GB)
    assert machine.peak_memory_bytes(CPU) - before < 2**30, "the weights alone are 600 GiB"


@pytest.mark.parametrize(
    ("optimizer", "momentum"), [*((name, None) for name in OPTIMIZERS), ("sgd", 0.0), ("rmsprop", 0.0)]
)
def test_what_an_optimiser_keeps_is_what_it_keeps_of_a_network(optimizer, momentum):
    optim = OptimConfig(optimizer, momentum=momentum)
    network = build_model("resnet", blocks=(1,), channels=(4,))
    states = build_optimizer(network, optim).state.values()
    kept = sum(tensor.numel() for state in states for tensor in state.values() if tensor.dim())
    assert kept == values_per_weight(optim) * sum(parameter.numel() for parameter in network.parameters())


def test_a_card_is_made_smaller(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Card", (), {"total_memory": 24 * GB}))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *arguments: calls.append(arguments))
    limit_memory(6 * GB, CARD)
    ((fraction, device),) = calls
    assert math.isclose(fraction * 24 * GB, 6 * GB - CONTEXT_BYTES)
    assert device == CARD
    expected = r"the memory limit of 32.00 GiB exceeds the card's 24.00 GiB; lower --memory-limit"
    with pytest.raises(ConfigError, match=expected):
        limit_memory(32 * GB, CARD)


def test_sizes_are_read_and_other_texts_are_not():
    for text, expected in (("6GB", 6 * GB), ("1.5gb", 3 * GB // 2), ("900 MB", 900 * MB), (None, None)):
        assert EngineConfig(memory_limit=text).memory_limit_bytes == expected
    for text in ("", "6", "GB", "0GB", "-6GB", "6 G", "6TB", "1e3GB", "6GB\n"):
        with pytest.raises(ConfigError, match="is no size; write gigabytes as 6GB"):
            EngineConfig(memory_limit=text)
