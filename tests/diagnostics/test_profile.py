"""`fastcifar profile`: the figures of a short run agree with each other and with what was run."""

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcifar import cli, device
from fastcifar.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from fastcifar.data.sources import load_dataset
from fastcifar.diagnostics import profile
from fastcifar.diagnostics.profile import moved_values, on_data_at_hand
from fastcifar.diagnostics.profile_report import PARTS
from fastcifar.engine.setup import build_trainer
from fastcifar.models.count import count_network

SIZE = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    train = load_dataset("synthetic")
    arrays = {"train_images": train.images[:200, :SIZE, :SIZE], "train_labels": train.labels[:200] % 4}
    arrays |= {"test_images": train.images[200:220, :SIZE, :SIZE], "test_labels": train.labels[200:220] % 4}
    path = tmp_path_factory.mktemp("data") / "set.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in arrays.items()})
    return path


@pytest.fixture(autouse=True)
def small_rates(monkeypatch):
    """Measures the device's rates on little memory and briefly; to do it well takes half a second and 256 MB."""
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


def test_the_figures_of_a_run_agree(images, tmp_path, capsys):
    flags = (
        f"--dataset {images} --chunk-size 40 --loader torch --device cpu --precision fp32 --compile off --batch-size 20"
    )
    flags += " --arch resnet --blocks 1 --channels 4 --epochs 1 --steps 5 --sharpness sam --clip-norm 1"
    out = tmp_path / "new" / "profile"
    assert cli.main(["profile", *flags.split(), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["profile.json", "split.png", "trace.json.gz"]
    figures = json.loads((out / "profile.json").read_text())
    seconds, split, floors = (figures[name] for name in ("step_seconds", "split", "floors"))
    assert figures["steps"] == 6, "whole chunks of two batches"
    assert tuple(split) == PARTS
    assert sum(split.values()) == pytest.approx(seconds, rel=1e-9)
    assert split["idle"] >= 0
    assert all(split[name] > 0 for name in ("data", "forward", "backward", "optimiser", "averages"))
    assert figures["images_per_second"] == pytest.approx(20 / seconds)
    count = count_network("resnet", classes=4, image_size=SIZE, blocks=(1,), channels=(4,))
    assert figures["flops_per_step"] == 2 * 20 * count.training_flops, "SAM takes two passes"
    assert floors["arithmetic"] == pytest.approx(figures["flops_per_step"] / figures["matmul_flops_per_second"])
    assert floors["bandwidth"] == pytest.approx(figures["bytes_per_step"] / figures["copy_bytes_per_second"])
    assert figures["flop_utilization"] * seconds == pytest.approx(floors["arithmetic"])
    assert figures["bandwidth_share"] * seconds == pytest.approx(floors["bandwidth"])
    assert figures["host_launches"] is None
    assert len(figures["costliest"]) == 10
    printed = capsys.readouterr().out
    for text in (f"{figures['images_per_second']:,.0f} img/s", "operations", "peak memory", str(out / "split.png")):
        assert text in printed


def test_the_trace_holds_what_was_run(images, tmp_path):
    trainer, path = build_trainer(config(images), 0.0), tmp_path / "trace.json.gz"
    watch = profile.Watch(trainer.device)
    events = profile.traced(trainer, trainer.endless_batches(), 4, watch.on, path)
    calls = Counter(event.name for event in events)
    assert {name: calls[f"part: {name}"] for name in PARTS[:-1]} == dict.fromkeys(PARTS[:-1], 4)
    assert calls["aten::conv2d"] == calls["aten::convolution_backward"] == 4 * 3
    assert set(watch.seconds) == set(PARTS[:-1])
    with gzip.open(path, "rt") as file:
        assert "aten::conv2d" in file.read()


def test_the_last_epoch_is_followed_by_the_first(images):
    trainer = build_trainer(config(images), 0.0)
    seen = []

    def noted() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in trainer.endless_batches():
            seen.append((trainer.state.steps_done, batch[1].tolist()))
            yield batch

    assert trainer.run_steps(noted(), 23) > 0
    assert [number for number, _ in seen] == [*range(20), 0, 1, 2]
    assert seen[20:] == seen[:3]
    assert seen[0][1] != seen[10][1]


def test_every_part_of_a_step_has_its_name(images):
    optim = OptimConfig(sharpness="sam", clip_norm=1.0)
    trainer = build_trainer(config(images, optim=optim), 0.0)
    names = [profile.NAMES.get(type(part).__name__, "other") for part in trainer.launch.step.parts]
    passes = ["forward", "backward"]
    assert names == [*passes, "optimiser", *passes, *["optimiser"] * 3, "averages", "other"]


def test_convolutions_move_their_inputs_and_outputs():
    """Counts the maps by hand: three convolutions, and the gradients of two inputs and three weights."""
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
    assert "steps is 0; expected 1 to 10000" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_figures_of_a_gpu_agree(images, gpu, monkeypatch, tmp_path):
    """The profiler sees nothing of a pretended GPU, so its events are made up."""
    monkeypatch.setattr(profile, "COPIED_BYTES", {"cuda": 2**20})
    monkeypatch.setitem(device.MATRIX_SIZE, "cuda", 64)
    monkeypatch.setattr(profile, "traced", lambda *arguments: [])
    monkeypatch.setattr(profile, "parts_on_gpu", lambda *arguments: {"data": 1.0, "forward": 3.0})
    engine = EngineConfig(device="cuda:0", precision="bf16", compile="off")
    trainer = build_trainer(replace(config(images), engine=engine), 0.0)
    assert isinstance(trainer.capture(), int)
    figures = profile.measure(trainer, 4, tmp_path / "trace.json.gz")
    assert figures.captured
    assert figures.split["idle"] == pytest.approx(figures.step_seconds), "no kernel was seen"
    assert figures.launches == 0


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
