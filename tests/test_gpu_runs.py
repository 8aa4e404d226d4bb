"""Every command through its CUDA branches, from the command line to its result, on the pretended GPU."""

import json
import os
import signal
from pathlib import Path

import numpy
import pytest
import torch

from fastcifar import cli
from fastcifar import device as machine
from fastcifar.data import loader, synthetic
from fastcifar.device import native_bf16
from fastcifar.diagnostics import profile
from fastcifar.engine import evaluate, launch, run, state, trainer
from fastcifar.inference import evaluate as evaluation

TRAIN = (
    "train --dataset synthetic --arch resnet --blocks 1 --channels 8 --batch-size 20 --epochs 2 --compile off".split()
)


@pytest.fixture(autouse=True)
def small_and_steady(gpu, dali, monkeypatch, tmp_path):
    """An epoch must not wait, but at its end and where a snapshot is due; and what a GPU would compute in large is
    small.
    """

    def under(strict, function):
        def wrapped(*arguments):
            with gpu.steady(strict):
                return function(*arguments)

        return wrapped

    for owner, name, strict in (
        (trainer.Trainer, "run_epoch", True),
        (trainer.Trainer, "keep_snapshot", False),
        (trainer, "synchronize", False),
    ):
        monkeypatch.setattr(owner, name, under(strict, getattr(owner, name)))
    monkeypatch.setattr(synthetic, "SPLITS", {"train": 260, "test": 130})
    monkeypatch.setitem(machine.MATRIX_SIZE, "cuda", 64)
    monkeypatch.setitem(evaluate.BATCH_SIZE, "cuda", 50)
    monkeypatch.setitem(loader.CHUNK_SIZE, "cuda", 100)
    monkeypatch.setitem(evaluation.SPEED_SIZES, "cuda", (1, 8))
    monkeypatch.setitem(profile.COPIED_BYTES, "cuda", 2**20)
    monkeypatch.chdir(tmp_path)


def weights(folder: str) -> dict[str, bytes]:
    checkpoints = Path(folder, "checkpoints")
    return {
        file.name: file.read_bytes()
        for file in (checkpoints / (checkpoints / "latest").read_text().strip()).glob("*.safetensors")
    }


def result(folder: str) -> dict:
    return json.loads(Path(folder, "result.json").read_text())


def test_a_run_by_its_defaults(gpu):
    assert cli.main([*TRAIN, "--out", "run"]) == 0
    chosen = json.loads(Path("run/config.json").read_text())
    assert chosen["engine"] | {"device": "cuda:0", "precision": "bf16", "capture": "on"} == chosen["engine"]
    assert chosen["data"]["loader"] == "dali"
    assert result("run")["device"] == "Pretended"
    assert result("run")["flop_utilization"] > 0
    assert gpu.captures == 3, "one step, eight steps, an evaluation"
    assert gpu.replays > 4 + 4


def test_every_loader_and_every_way_to_launch_ends_in_the_same_bytes():
    """But for the images per second."""
    for number, flags in enumerate(
        (["--loader", "torch"], ["--loader", "triton"], ["--loader", "dali"], ["--capture", "off"])
    ):
        assert cli.main([*TRAIN, *flags, "--out", str(number)]) == 0
    for number in "123":
        assert weights(number) == weights("0")


@pytest.mark.parametrize(
    "flags",
    [
        "--se-ratio 0.25 --memory-limit 4GB",
        "--schedule warm-restarts --restart-period 1ep --warmup 0% --snapshots --swa-start 50%",
        "--schedule plateau --patience 0 --micro-batch 20",
        "--optimizer muon --sharpness sam --clip-norm 1",
    ],
)
def test_methods(flags):
    assert cli.main([*TRAIN, *flags.split(), "--out", "run"]) == 0


@pytest.mark.parametrize(
    ("backend", "policy"),
    [("torch", "autoaugment,cutmix"), ("triton", "randaugment:2,9,mixup:0.4"), ("dali", "standard,autoaugment,cutmix")],
)
def test_policies(policy, backend):
    assert cli.main([*TRAIN, "--epochs", "1", "--augment", policy, "--loader", backend, "--out", "run"]) == 0


def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(monkeypatch):
    assert cli.main([*TRAIN, "--val-split", "50", "--out", "whole"]) == 0
    launched, call = [], launch.Launcher.__call__

    def stopped(self, *batch):
        call(self, *batch)
        launched.append(batch)
        if len(launched) == 14:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(launch.Launcher, "__call__", stopped)
        assert cli.main([*TRAIN, "--val-split", "50", "--out", "stopped"]) == 128 + signal.SIGTERM
    assert cli.main(["train", "--resume", "stopped"]) == 0
    assert {name: content for name, content in weights("stopped").items() if name != "state.safetensors"} == {
        name: content for name, content in weights("whole").items() if name != "state.safetensors"
    }


def test_float16_with_a_scaled_loss_on_an_old_card(gpu, monkeypatch):
    monkeypatch.setattr(synthetic, "SPLITS", {"train": 100, "test": 50})
    gpu.capability = (7, 5)
    assert cli.main([*TRAIN, "--epochs", "1", "--capture", "off", "--out", "run"]) == 0
    assert json.loads(Path("run/config.json").read_text())["engine"]["precision"] == "fp16"


def test_what_comes_after_training(capsys):
    for seed in "01":
        assert cli.main([*TRAIN, "--epochs", "1", "--val-split", "50", "--seed", seed, "--out", seed]) == 0
    accuracy = result("0")["test_accuracy"]
    capsys.readouterr()
    assert cli.main(["eval", "0"]) == 0
    assert f"{100 * accuracy:.2f}%" in capsys.readouterr().out
    assert cli.main(["eval", "0", "--tta", "mirror", "--speed"]) == 0
    numpy.save("images.npy", numpy.zeros((17, 32, 32, 3), dtype=numpy.uint8))
    assert cli.main(["predict", "0", "1", "--images", "images.npy", "--out", "answers.csv"]) == 0
    assert len(Path("answers.csv").read_text().splitlines()) == 1 + 17
    assert cli.main(["ensemble", "0", "1", "--out", "both"]) == 0
    assert Path("both/ensemble.json").exists()


@pytest.mark.parametrize("capture", ["on", "off"])
def test_profile(capture, monkeypatch):
    """But for what only the profiler of a real GPU sees."""
    monkeypatch.setattr(profile, "traced", lambda trainer, batches, *_: trainer.run_steps(batches, 2) and [])
    monkeypatch.setattr(profile, "kernel_seconds", lambda events: {"forward": 1.0})
    flags = (
        "--arch resnet --blocks 1 --channels 8 --dataset synthetic "
        f"--compile off --capture {capture} --batch-size 20 --steps 8"
    )
    assert cli.main(["profile", *flags.split(), "--out", "profile"]) == 0
    assert json.loads(Path("profile/profile.json").read_text())["captured"] is (capture == "on")


def test_doctor(capsys):
    assert cli.main(["doctor", "--quick"]) in (0, 1)
    said = capsys.readouterr().out
    assert "Pretended, sm_90" in said
    assert "bf16 on cuda:0" in said


def test_a_capture_that_fails_in_python_is_launched(gpu, capsys):
    gpu.failures["capture"] = NotImplementedError("no such thing")
    assert cli.main([*TRAIN, "--capture", "on", "--out", "run"]) == 0
    assert "Not captured, since that failed (no such thing)" in capsys.readouterr().out


def test_weights_that_cannot_be_put_back_after_a_capture_are_not_trained_on(monkeypatch, capsys):
    def no_room(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(state, "set_random_state", no_room)
    assert cli.main([*TRAIN, "--out", "run"]) == 2
    assert "the GPU's memory ran out" in capsys.readouterr().err


def test_a_capture_that_fails_in_cuda_ends_in_a_sentence(gpu, capsys):
    gpu.failures["capture"] = torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")
    assert cli.main([*TRAIN, "--out", "run"]) == 2
    assert "try --capture off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "the GPU's memory ran out (CUDA out of memory.",
        ),
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure"),
            "the GPU failed (CUDA error: unspecified launch failure)",
        ),
    ],
    ids=["memory", "lost"],
)
def test_a_gpu_that_fails_in_the_midst_of_an_epoch_leaves_the_last_checkpoint_whole(
    gpu, monkeypatch, capsys, error, sentence
):
    assert cli.main([*TRAIN, "--out", "whole"]) == 0
    end_epoch = trainer.Trainer.end_epoch

    def failing_next(self, totals):
        record = end_epoch(self, totals)
        if self.state.epoch == 1:
            gpu.failures["replay"] = error
        return record

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "end_epoch", failing_next)
        assert cli.main([*TRAIN, "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "go on with fastcifar train --resume run" in said
    assert cli.main(["train", "--resume", "run"]) == 0
    assert {**weights("run"), "state.safetensors": b""} == {**weights("whole"), "state.safetensors": b""}


def test_memory_that_runs_out_before_the_first_step_leaves_no_folder(monkeypatch, capsys):
    def no_room(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(state, "build_optimizer", no_room)
    assert cli.main([*TRAIN, "--out", "run"]) == 2
    assert "the GPU's memory ran out (CUDA out of memory); close what else uses the card" in capsys.readouterr().err
    assert not Path("run").exists()


def test_bfloat16_is_looked_for_on_the_card_that_was_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (9, 0), 1: (7, 5)}[device.index])
    assert [native_bf16(torch.device("cuda", index)) for index in (0, 1)] == [True, False]


def test_memory_that_runs_out_at_the_very_end_costs_no_result(monkeypatch):
    def no_room(device, dtype):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run, "matmul_flops_per_second", no_room)
    assert cli.main([*TRAIN, "--epochs", "1", "--out", "run"]) == 0
    assert result("run")["flop_utilization"] is None


def test_dali_that_fails_on_the_first_chunk_ends_in_a_sentence(monkeypatch, capsys):
    from fastcifar.augment.dali_apply import DaliApplier

    def fail(self, *arguments):
        raise RuntimeError("Error in GPU operator `nvidia.dali.fn.warp_affine`")

    monkeypatch.setattr(DaliApplier, "submit", fail)
    assert cli.main([*TRAIN, "--out", "run"]) == 2
    assert (
        "DALI failed (Error in GPU operator `nvidia.dali.fn.warp_affine`); choose --loader triton"
        in capsys.readouterr().err
    )
