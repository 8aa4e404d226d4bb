"""`fastcifar profile`: traces made up by hand are read as they were made, and the figures of a short run agree with
each other.
"""

import gzip
import json
import math

import numpy as np
import pytest
import torch

from fastcifar import cli
from fastcifar.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from fastcifar.data.sources import load_dataset
from fastcifar.diagnostics import profile
from fastcifar.diagnostics.profile import moved_values, on_data_at_hand
from fastcifar.diagnostics.profile_report import (
    PARTS,
    costliest,
    kernel_seconds,
    launches_of,
    read_trace,
    share_busy,
    split_of,
)
from fastcifar.engine.setup import build_trainer
from fastcifar.models.count import count_network

SIZE = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A small data set, as a file."""
    train = load_dataset("synthetic")
    arrays = {"train_images": train.images[:200, :SIZE, :SIZE], "train_labels": train.labels[:200] % 4}
    arrays |= {"test_images": train.images[200:220, :SIZE, :SIZE], "test_labels": train.labels[200:220] % 4}
    path = tmp_path_factory.mktemp("data") / "set.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in arrays.items()})
    return path


@pytest.fixture(autouse=True)
def small_rates(monkeypatch):
    """Rates of a device take half a second, and 256 MB, to measure well."""
    monkeypatch.setattr(profile, "COPIED_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(profile, "COPY_SECONDS", 0.0)


def config(images, **parts: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig("resnet", blocks=(1,), channels=(4,)),
        data=DataConfig(str(images), chunk_size=40, loader="torch"),
        engine=EngineConfig(device="cpu", precision="fp32", compile="off", capture="off"),
        epochs=2,
        batch_size=20,
        **parts,
    )


def made_trace(path, *rows: tuple) -> list:
    """A trace with rows of (name, category, start, duration, thread), in microseconds, and entries that are no
    stretches.
    """
    entries = [{"ph": "X", "name": n, "cat": c, "ts": s, "dur": d, "pid": 1, "tid": t} for n, c, s, d, t in rows]
    entries += [{"ph": "M", "name": "process_name", "pid": 1}, {"ph": "i", "name": "mark", "ts": 5, "pid": 1, "tid": 1}]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": entries}, file)
    return read_trace(path)


def test_a_trace_of_a_gpu(tmp_path):
    """Two steps, whose kernels overlap once; the stream of the data runs beside them."""
    events = made_trace(
        tmp_path / "trace.json.gz",
        ("part: forward", "user_annotation", 0, 100, 1),
        ("part: backward", "user_annotation", 100, 100, 1),
        ("part: data", "user_annotation", 220, 30, 1),
        ("somebody else's", "user_annotation", 0, 500, 1),
        ("aten::conv", "cpu_op", 1, 50, 1),
        ("conv", "kernel", 10, 20, "stream 7"),
        ("conv", "kernel", 20, 30, "stream 7"),
        ("Memset", "gpu_memset", 90, 20, "stream 7"),
        ("wgrad", "kernel", 150, 50, "stream 7"),
        ("crop", "kernel", 160, 10, "stream 9"),
        ("crop", "kernel", 230, 20, "stream 9"),
        ("lost", "kernel", 300, 10, "stream 7"),
        ("cudaLaunchKernel", "cuda_runtime", 2, 1, 1),
        ("cuLaunchKernelEx", "cuda_driver", 4, 1, 1),
        ("cudaGraphLaunch", "cuda_runtime", 6, 1, 1),
        ("cudaMemsetAsync", "cuda_runtime", 8, 1, 1),
        ("cudaStreamSynchronize", "cuda_runtime", 9, 90, 1),
    )
    assert kernel_seconds(events) == pytest.approx({"forward": 70e-6, "backward": 60e-6, "data": 20e-6})
    assert share_busy(events) == pytest.approx((40 + 20 + 50 + 20 + 10) / 300)
    assert launches_of(events, 2) == {"launches": 3.5, "host_launches": 2.0}
    costs = costliest(events, 2)
    assert [(cost.name, cost.calls) for cost in costs] == [
        ("conv", 1),
        ("wgrad", 0.5),
        ("crop", 1),
        ("Memset", 0.5),
        ("lost", 0.5),
    ]
    assert sum(cost.seconds for cost in costs) == pytest.approx(160e-6 / 2)


def test_a_trace_of_a_cpu(tmp_path):
    """An operation's own time is what those within it leave, on its thread."""
    events = made_trace(
        tmp_path / "trace.json.gz",
        ("part: forward", "user_annotation", 0, 100, 1),
        ("outer", "cpu_op", 0, 100, 1),
        ("inner", "cpu_op", 10, 30, 1),
        ("innermost", "cpu_op", 10, 30, 1),
        ("inner", "cpu_op", 40, 20, 1),
        ("other thread", "cpu_op", 50, 500, 2),
        ("outer", "cpu_op", 100, 10, 1),
    )
    assert launches_of(events, 3) == {"launches": 1.0, "host_launches": None}
    found = {cost.name: (cost.calls, round(cost.seconds * 1e6, 6)) for cost in costliest(events, 1)}
    assert found == {"other thread": (1, 500), "outer": (2, 60), "inner": (2, 20), "innermost": (1, 30)}
    assert share_busy(events) == 0.0
    assert kernel_seconds(events) == {}


def test_no_more_than_ten_are_named(tmp_path):
    events = made_trace(tmp_path / "trace.json.gz", *((f"op{i}", "cpu_op", 100 * i, i, 1) for i in range(1, 31)))
    assert [cost.name for cost in costliest(events, 1)] == [f"op{i}" for i in range(30, 20, -1)]


@pytest.mark.parametrize(
    ("parts", "idle", "expected"),
    [
        ({"forward": 2.0, "backward": 3.0, "data": 1.0}, 4.0, {"data": 1, "forward": 2, "backward": 3, "idle": 4}),
        ({"forward": 8.0, "data": 4.0}, 1.0, {"data": 3, "forward": 6, "idle": 1}),
        ({}, 0.0, {"idle": 10}),
    ],
)
def test_the_split_is_the_whole_step(parts, idle, expected):
    split = split_of(parts, idle, 10.0)
    assert tuple(split) == PARTS
    assert split == pytest.approx(dict.fromkeys(PARTS, 0) | expected)


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_the_figures_of_a_run_agree(images, method, tmp_path, capsys):
    flags = (
        f"--arch resnet --blocks 1 --channels 4 --dataset {images} "
        "--chunk-size 40 --loader torch --device cpu --precision fp32"
    )
    flags += " --compile off --batch-size 20 --epochs 1 --steps 5" + (
        " --sharpness sam --clip-norm 1" if method == "sam" else ""
    )
    out = tmp_path / "new" / "profile"
    assert cli.main(["profile", *flags.split(), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["profile.json", "split.png", "trace.json.gz"]
    figures = json.loads((out / "profile.json").read_text())
    assert figures["steps"] == 6, "whole chunks of two batches"
    seconds = figures["step_seconds"]
    assert tuple(figures["split"]) == PARTS
    assert sum(figures["split"].values()) == pytest.approx(seconds, rel=1e-9)
    assert all(part >= -1e-12 for part in figures["split"].values())
    assert all(figures["split"][name] > 0 for name in ("data", "forward", "backward", "optimiser", "averages"))
    assert figures["images_per_second"] == pytest.approx(20 / seconds)
    count = count_network("resnet", classes=4, image_size=SIZE, blocks=(1,), channels=(4,))
    assert figures["flops_per_step"] == 20 * count.training_flops * (2 if method == "sam" else 1)
    assert figures["floors"]["arithmetic"] == pytest.approx(
        figures["flops_per_step"] / figures["matmul_flops_per_second"]
    )
    assert figures["flop_utilization"] * seconds == pytest.approx(figures["floors"]["arithmetic"])
    assert figures["bandwidth_share"] * seconds == pytest.approx(
        figures["bytes_per_step"] / figures["copy_bytes_per_second"]
    )
    assert figures["host_launches"] is None
    assert len(figures["costliest"]) == 10
    printed = capsys.readouterr().out
    for text in (
        f"{figures['images_per_second']:,.0f} img/s",
        "operations",
        "peak memory",
        "idle",
        str(out / "split.png"),
    ):
        assert text in printed
    assert (out / "split.png").read_bytes().startswith(b"\x89PNG")


def test_the_trace_holds_what_was_run(images, tmp_path):
    """Calls a step of the operations of a network whose layers are known."""
    trainer = build_trainer(config(images), 0.0)
    trace = tmp_path / "trace.json.gz"
    figures = profile.measure(trainer, 4, trace)
    events = read_trace(trace)
    marks = [event.name for event in events if event.category == "user_annotation" and event.name.startswith("part: ")]
    assert {name: marks.count(f"part: {name}") for name in PARTS[:-1]} == dict.fromkeys(PARTS[:-1], 4)
    convolutions = [event for event in events if event.name == "aten::conv2d"]
    assert len(convolutions) == 4 * 3
    assert sum(event.name == "aten::convolution_backward" for event in events) == 4 * 3
    assert figures.launches == launches_of(events, 4)["launches"]
    assert {cost.name for cost in figures.costliest} <= {event.name for event in events}


def test_the_course_goes_round(images):
    """Two epochs of ten steps, and the steps that follow them are the first ones again."""
    trainer = build_trainer(config(images), 0.0)
    seen = []
    batches = trainer.endless_batches()
    seen_batches = (
        (seen.append((trainer.state.steps_done, labels.clone())), (images, labels))[1] for images, labels in batches
    )
    assert trainer.run_steps(seen_batches, 23) > 0
    assert [number for number, _ in seen] == [*range(20), 0, 1, 2]
    for (_, first), (_, again) in zip(seen, seen[20:], strict=False):
        assert torch.equal(first, again)
    assert not torch.equal(seen[0][1], seen[10][1])


def test_every_part_of_a_step_has_its_name(images):
    optim = OptimConfig(sharpness="sam", clip_norm=1.0)
    trainer = build_trainer(config(images, optim=optim), 0.0)
    names = [profile.NAMES.get(type(part).__name__, "other") for part in trainer.launch.step.parts]
    passes = ["forward", "backward"]
    assert names == [*passes, "optimiser", *passes, *["optimiser"] * 3, "averages", "other"]


def test_convolutions_move_their_inputs_and_outputs():
    """Of a network whose maps can be counted by hand: three convolutions, and the gradients of two inputs and three
    weights.
    """
    pixels, options = SIZE * SIZE, {"classes": 4, "image_size": SIZE, "blocks": (1,), "channels": (4,)}
    stem, block = 3 * pixels + 4 * pixels, 2 * 4 * pixels
    assert moved_values("resnet", **options) == stem + 2 * block + stem + 2 * 2 * block


def test_the_bytes_of_an_update_are_those_of_its_tensors(images):
    trainer = build_trainer(config(images), 0.0)
    rates = profile.rates(trainer)
    parameters = sum(parameter.nbytes for parameter in trainer.model.parameters())
    weights = parameters + sum(buffer.nbytes for buffer in trainer.model.buffers())
    maps = 20 * 4 * moved_values("resnet", **trainer.options)
    assert rates["bytes_per_step"] == maps + 3 * weights + 2 * parameters + 2 * parameters + 3 * weights
    assert math.isfinite(rates["copy_bytes_per_second"])


def test_nothing_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("auto", "cifar10", "cifar100", "synthetic"):
        assert on_data_at_hand(RunConfig(data=DataConfig(name))).data.dataset == "synthetic"
    (tmp_path / "fastcifar").mkdir()
    (tmp_path / "fastcifar" / "cifar-10-python.tar.gz").touch()
    for name in ("auto", "cifar10"):
        assert on_data_at_hand(RunConfig(data=DataConfig(name))).data.dataset == "cifar10"


def test_refusals(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", "--arch", "resnet20_v2", "--steps", "0"]) == 2
    assert "steps is 0; expected 1 or more" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("capture", ["on", "off"])
def test_a_gpu_is_profiled(images, capture, tmp_path):
    flags = (
        f"--arch resnet --blocks 1 --channels 8 --dataset {images} "
        f"--compile off --capture {capture} --batch-size 20 --steps 8"
    )
    assert cli.main(["profile", *flags.split(), "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "profile.json").read_text())
    assert figures["captured"] is (capture == "on")
    assert sum(figures["split"].values()) == pytest.approx(figures["step_seconds"])
    assert all(figures["split"][name] > 0 for name in ("data", "forward", "backward", "optimiser", "averages"))
    assert figures["launches"] > 20
    assert (figures["host_launches"] < figures["launches"] / 2) == (capture == "on")
