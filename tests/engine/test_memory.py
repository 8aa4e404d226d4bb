"""Memory plans: on cards of every size the parts are those of closed forms, sum to less than the card, and leave no room for more."""

import functools
import math
from dataclasses import replace

import pytest
import torch

from fastcifar.config import AverageConfig, DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from fastcifar.engine import memory
from fastcifar.engine.memory import CONTEXT_BYTES, DataSize, divisors, fit_to_memory, halved, limit_memory, plan_memory
from fastcifar.errors import ConfigError

GB, MB = 2**30, 2**20
CIFAR = DataSize(50_000, 10_000)
NETWORKS = {
    "resnet_prop": (11_171_146, 2_202_624, 64 * 32 * 32),
    "resnetrs50": (26_115_738, 1_244_000, 64 * 16 * 16),
    "wrn28_10": (36_479_194, 9_248_000, 160 * 32 * 32),
}
"""Parameters, bytes of activations an image in bfloat16 (`fastcifar count`, which tests/models hold), values of the largest map."""
PLANS = {
    ("resnet_prop", 128): {6: (128, 1000), 8: (128, 2000), 11: (128, 2000), 24: (128, 2000)},
    ("resnet_prop", 2048): {6: (1024, 1000), 8: (1024, 2000), 11: (2048, 2000), 24: (2048, 2000)},
    ("resnetrs50", 128): {6: (128, 2000), 8: (128, 2000), 11: (128, 2000), 24: (128, 2000)},
    ("resnetrs50", 8192): {6: (2048, 2000), 8: (4096, 2000), 11: (4096, 2000), 24: (8192, 2000)},
    ("wrn28_10", 128): {6: (128, 500), 8: (128, 500), 11: (128, 1000), 24: (128, 2000)},
    ("wrn28_10", 512): {6: (256, 500), 8: (256, 500), 11: (512, 1000), 24: (512, 2000)},
    ("wrn28_10", 2048): {6: (256, 500), 8: (256, 500), 11: (512, 1000), 24: (1024, 2000)},
}
"""Micro batch and evaluation batch, by network and batch size, on cards of so many GB."""


def run(arch: str = "resnet_prop", batch_size: int = 128, **parts: object) -> RunConfig:
    return RunConfig(model=ModelConfig(arch), batch_size=batch_size, **parts)


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """Building the larger networks takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "footprint", remembered(memory.footprint))
        yield


def remembered(footprint):
    """`footprint`, computed once for what it depends on, which a batch size and an engine are not among."""
    cached = functools.cache(footprint)
    return lambda config, *others: cached(replace(config, batch_size=128, engine=EngineConfig()), *others)


@pytest.mark.parametrize(("arch", "batch_size"), PLANS, ids=str)
def test_plans_of_the_usual_cards_are_those_of_closed_forms(arch, batch_size):
    parameters, activations, largest = NETWORKS[arch]
    for gigabytes, (micro_batch, evaluation_batch) in PLANS[arch, batch_size].items():
        limit = gigabytes * GB
        plan = plan_memory(run(arch, batch_size), CIFAR, limit)
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
        assert (parts["CUDA and its libraries"], parts["reserve"]) == (600 * MB, limit // 10)
        assert sum(parts.values()) <= limit
        assert micro_batch == batch_size or sum(parts.values()) + micro_batch * image > limit, "twice as many would fit"
        assert plan.passes == batch_size // micro_batch


def test_batches_are_split_into_equal_parts():
    plan = plan_memory(run("wrn28_10", 3 * 7 * 31), CIFAR, 6 * GB)
    assert (plan.micro_batch, plan.passes) == (217, 3)
    assert "in 3 passes of 217, with batch norm statistics of each pass" in str(plan)
    assert divisors(12) == [12, 6, 4, 3, 2, 1]
    assert [halved(2000, most) for most in (5000, 2000, 1999, 300, 1, 0)] == [2000, 2000, 1000, 250, 1, 1]


def test_what_is_asked_for_is_kept():
    config = run("resnet_prop", 100, engine=EngineConfig(micro_batch=30), data=DataConfig(chunk_size=500))
    plan = plan_memory(config, CIFAR, 6 * GB)
    assert (plan.micro_batch, plan.passes, plan.chunk_size) == (30, 4, 500)
    assert plan_memory(replace(config, engine=EngineConfig(micro_batch=999)), CIFAR, 6 * GB).micro_batch == 100


def test_everything_that_is_kept_counts():
    plain = plan_memory(run(), CIFAR, 6 * GB).parts
    config = run(
        optim=OptimConfig("adamw", sharpness="sam"),
        average=AverageConfig((0.9, 0.99), "50%"),
        data=DataConfig(val_split=5000),
    )
    parts = plan_memory(config, CIFAR, 6 * GB, value_bytes=4).parts
    assert parts["averages"] == 3 * plain["weights"]
    assert parts["best weights"] == 4 * plain["weights"]
    assert parts["weights that SAM returns to"] == plain["weights"]
    assert 2 * plain["optimiser"] <= parts["optimiser"] <= 2 * plain["optimiser"] + 8 * 200
    assert parts["activations"] == 2 * plain["activations"]
    assert parts["weights in low precision"] == 0


def test_larger_images_come_in_smaller_chunks():
    plan = plan_memory(run(), DataSize(5000, 1000, 10, 96), 6 * GB)
    assert plan.chunk_size == 512
    assert plan.parts["images under augmentation"] == 512 * 3 * 96 * 96 * 16
    assert 2 * plan.parts["images under augmentation"] > 6 * GB / 16


@pytest.mark.parametrize("engine", [EngineConfig(), EngineConfig(micro_batch=64)], ids=["any", "asked for"])
def test_what_does_not_fit_is_refused(engine):
    with pytest.raises(ConfigError, match=r"wrn28_10 with \d+ images a pass needs about [\d.,]+ .iB, and there are 1\.00 GiB; choose"):
        plan_memory(run("wrn28_10", engine=engine), CIFAR, GB)


def test_a_cpu_trains_as_on_the_card_that_is_named():
    cpu = torch.device("cpu")
    free = run("wrn28_10", 512)
    config, plan = fit_to_memory(free, CIFAR, cpu)
    assert (config.engine.micro_batch, config.data.chunk_size, plan) == (512, 1024, None)
    limited = replace(free, engine=EngineConfig(memory_limit="6GB"))
    config, plan = fit_to_memory(limited, CIFAR, cpu)
    assert (config.engine.micro_batch, config.data.chunk_size, plan.limit) == (256, 1024, 6 * GB)
    assert fit_to_memory(config, CIFAR, cpu)[0] == config
    limit_memory(6 * GB, cpu)


def test_a_card_is_made_smaller(monkeypatch):
    """And without a limit, what is free on it is the limit."""
    calls, card = [], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Card", (), {"total_memory": 24 * GB}))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GB - CONTEXT_BYTES, 24 * GB))
    limit_memory(6 * GB, card)
    ((fraction, device),) = calls
    assert math.isclose(fraction * 24 * GB, 6 * GB - CONTEXT_BYTES)
    assert device == card
    with pytest.raises(ConfigError, match=r"the memory limit of 32.00 GiB exceeds the card's 24.00 GiB; lower --memory-limit"):
        limit_memory(32 * GB, card)
    config, plan = fit_to_memory(run("wrn28_10", 512), CIFAR, card)
    assert (plan.limit, config.engine.micro_batch, config.data.chunk_size) == (6 * GB, 256, 8192)


@pytest.mark.parametrize(("text", "expected"), [("6GB", 6 * GB), ("1.5gb", 3 * GB // 2), ("900 MB", 900 * MB), (None, None)])
def test_sizes_are_read(text, expected):
    assert EngineConfig(memory_limit=text).memory_limit_bytes == expected


@pytest.mark.parametrize("text", ["", "6", "GB", "0GB", "-6GB", "6 G", "6TB", "1e3GB", "6GB\n"])
def test_other_texts_are_no_sizes(text):
    with pytest.raises(ConfigError, match="is no size; write gigabytes as 6GB"):
        EngineConfig(memory_limit=text)
