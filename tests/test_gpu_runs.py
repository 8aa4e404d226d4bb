"""Every command through its CUDA branches, from the command line to its result, on the pretended GPU."""

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from made_run import weight_files

from fastcifar import cli
from fastcifar import device as machine
from fastcifar.augment.dali_apply import DaliApplier
from fastcifar.data import loader, synthetic
from fastcifar.device import native_bf16
from fastcifar.diagnostics import profile
from fastcifar.engine import evaluate, launch, run, state, trainer
from fastcifar.inference import evaluate as evaluation
from fastcifar.kernels import dispatch

NETWORK = "--dataset synthetic --arch resnet --blocks 1 --channels 4 --batch-size 20 --compile off".split()
TRAIN = ["train", *NETWORK, "--epochs", "2", "--out", "run"]


@pytest.fixture(autouse=True)
def small_and_steady(gpu, dali, monkeypatch, tmp_path):
    """Forbids an epoch to wait, except at its end and where a snapshot is due, and makes all work small.

    Nothing is drawn, since that needs no GPU.
    """

    def under(strict, function):
        def wrapped(*arguments):
            with gpu.steady(strict):
                return function(*arguments)

        return wrapped

    monkeypatch.setattr(trainer.Trainer, "run_epoch", under(True, trainer.Trainer.run_epoch))
    monkeypatch.setattr(trainer.Trainer, "keep_snapshot", under(False, trainer.Trainer.keep_snapshot))
    monkeypatch.setattr(trainer, "synchronize", under(False, trainer.synchronize))
    monkeypatch.setattr(run, "draw_curves", lambda *arguments: None)
    monkeypatch.setattr(synthetic, "SPLITS", {"train": 220, "test": 60})
    monkeypatch.setitem(machine.MATRIX_SIZE, "cuda", 64)
    monkeypatch.setitem(evaluate.BATCH_SIZE, "cuda", 25)
    monkeypatch.setitem(loader.CHUNK_SIZE, "cuda", 100)
    monkeypatch.setitem(evaluation.SPEED_SIZES, "cuda", (1, 8))
    monkeypatch.setitem(profile.COPIED_BYTES, "cuda", 2**20)
    monkeypatch.chdir(tmp_path)


def weights(folder: str) -> dict[str, bytes]:
    """Returns the bytes of all weights in a run's last checkpoint, whose state also holds seconds, which differ."""
    return {name: content for name, content in weight_files(Path(folder)).items() if name != "state.safetensors"}


def result(folder: str) -> dict:
    return json.loads(Path(folder, "result.json").read_text())


def raising(error: Exception):
    def fail(*arguments, **options):
        raise error

    return fail


LOST = torch.AcceleratorError("CUDA error: unspecified launch failure")
NO_ROOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def test_every_loader_and_every_way_to_launch_ends_in_the_same_bytes(gpu):
    assert cli.main(TRAIN) == 0
    chosen = json.loads(Path("run/config.json").read_text())
    assert chosen["engine"] | {"device": "cuda:0", "precision": "bf16", "capture": "on"} == chosen["engine"]
    assert chosen["data"]["loader"] == "dali"
    assert result("run")["device"] == "Pretended"
    assert result("run")["flop_utilization"] > 0
    assert gpu.captures == 3, "one step, eight steps, an evaluation"
    assert gpu.replays > 4 + 4
    assert cli.main([*TRAIN, "--loader", "torch", "--capture", "off", "--out", "1"]) == 0
    assert cli.main([*TRAIN, "--loader", "triton", "--out", "2"]) == 0
    assert weights("run") == weights("1") == weights("2")


@pytest.mark.parametrize(
    "flags",
    [
        "--se-ratio 0.25 --memory-limit 4GB --augment autoaugment,cutmix --loader torch",
        "--schedule warm-restarts --restart-period 1ep --warmup 0% --snapshots --swa-start 50%",
        "--schedule plateau --patience 0 --micro-batch 20 --augment randaugment:2,9,mixup:0.4 --loader triton",
        "--optimizer muon --sharpness sam --clip-norm 1 --augment standard,autoaugment,cutmix --epochs 1",
    ],
)
def test_methods_and_policies(flags):
    assert cli.main([*TRAIN, *flags.split()]) == 0


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
    assert weights("stopped") == weights("whole")


def test_float16_with_a_scaled_loss_on_an_old_card(gpu, capsys):
    gpu.capability = (7, 5)
    assert cli.main([*TRAIN, "--epochs", "1", "--capture", "off", "--compile", "auto"]) == 0
    assert "This GPU has no native bfloat16: computing in float16 with a scaled loss." in capsys.readouterr().out
    assert json.loads(Path("run/config.json").read_text())["engine"]["precision"] == "fp16"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--precision bf16", "this GPU has no native bfloat16; choose --precision fp16 or auto."),
        ("--device cpu --capture on", "only a GPU's steps can be captured"),
    ],
)
def test_what_a_machine_lacks_is_refused(gpu, capsys, flags, sentence):
    gpu.capability = (7, 0)
    assert cli.main([*TRAIN, *flags.split()]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("installed", [True, False])
def test_dali_that_does_not_work_gives_way_to_triton(monkeypatch, capsys, installed):
    monkeypatch.setattr(loader, "dali_installed", lambda: installed)
    monkeypatch.setattr("fastcifar.augment.dali_apply.why_unusable", lambda device: "its driver is too old")
    assert cli.main([*TRAIN, "--epochs", "1"]) == 0
    said = "by Triton, since DALI does not work here: its driver is too old" in capsys.readouterr().err
    assert said is installed
    assert json.loads(Path("run/config.json").read_text())["data"]["loader"] == "triton"


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
    """Only what the profiler of a real GPU sees is left out."""
    monkeypatch.setattr(profile, "traced", lambda trainer, batches, *_: trainer.run_steps(batches, 2) and [])
    monkeypatch.setattr(profile, "kernel_seconds", lambda events: {"forward": 1.0})
    assert cli.main(["profile", *NETWORK, "--capture", capture, "--steps", "8", "--out", "profile"]) == 0
    assert json.loads(Path("profile/profile.json").read_text())["captured"] is (capture == "on")


def test_a_profiler_that_sees_no_kernels_ends_in_a_sentence(monkeypatch, capsys):
    blind = SimpleNamespace(events=list, export_chrome_trace=lambda path: None)
    monkeypatch.setattr(profile, "profile", lambda **options: nullcontext(blind))
    assert cli.main(["profile", *NETWORK, "--steps", "1", "--out", "profile"]) == 2
    assert "the profiler sees no kernels; let this user read the GPU's counters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("exist", "said"), [(True, "the card is older than sm_75"), (False, "Triton is not installed")]
)
def test_doctor_says_why_there_are_no_kernels(gpu, monkeypatch, capsys, exist, said):
    gpu.capability = (7, 0)
    monkeypatch.setattr(dispatch, "KERNELS_EXIST", exist)
    cli.main(["doctor", "--quick"])
    assert said in " ".join(capsys.readouterr().out.split())


def test_doctor(capsys):
    assert cli.main(["doctor", "--quick"]) in (0, 1)
    said = capsys.readouterr().out
    assert "Pretended, sm_90" in said
    assert "bf16 on cuda:0" in said


def test_a_capture_that_fails_in_python_is_launched(gpu, capsys):
    gpu.failures["capture"] = NotImplementedError("no such thing")
    assert cli.main([*TRAIN, "--capture", "on"]) == 0
    assert "Not captured, since that failed (no such thing)" in capsys.readouterr().out


def test_weights_that_cannot_be_put_back_after_a_capture_are_not_trained_on(monkeypatch, capsys):
    monkeypatch.setattr(state, "set_random_state", raising(NO_ROOM))
    assert cli.main(TRAIN) == 2
    assert "the GPU's memory ran out" in capsys.readouterr().err


def test_a_compiled_step_that_fails_in_cuda_ends_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **options: raising(LOST))
    assert cli.main([*TRAIN, "--compile", "on"]) == 2
    assert "the GPU failed (CUDA error: unspecified launch failure)" in capsys.readouterr().err


def test_a_capture_that_fails_in_cuda_ends_in_a_sentence(gpu, capsys):
    gpu.failures["capture"] = torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")
    assert cli.main(TRAIN) == 2
    assert "try --capture off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (NO_ROOM, "the GPU's memory ran out (CUDA out of memory."),
        (LOST, "the GPU failed (CUDA error: unspecified launch failure)"),
    ],
    ids=["memory", "lost"],
)
def test_a_gpu_that_fails_in_the_midst_of_an_epoch_leaves_the_last_checkpoint_whole(
    gpu, monkeypatch, capsys, error, sentence
):
    end_epoch = trainer.Trainer.end_epoch

    def failing_next(self, totals):
        record = end_epoch(self, totals)
        gpu.failures["replay"] = error
        return record

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "end_epoch", failing_next)
        assert cli.main(TRAIN) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "go on with fastcifar train --resume run" in said
    if error is LOST:
        assert cli.main(["train", "--resume", "run"]) == 0
        assert cli.main([*TRAIN, "--out", "whole"]) == 0
        assert weights("run") == weights("whole")


def test_memory_that_runs_out_before_the_first_step_leaves_no_folder(monkeypatch, capsys):
    monkeypatch.setattr(state, "build_optimizer", raising(NO_ROOM))
    assert cli.main(TRAIN) == 2
    assert "the GPU's memory ran out (CUDA out of memory." in (said := capsys.readouterr().err)
    assert "close what else uses the card" in said
    assert not Path("run").exists()


def test_memory_that_runs_out_at_the_very_end_costs_no_result(monkeypatch):
    monkeypatch.setattr(run, "matmul_flops_per_second", raising(NO_ROOM))
    assert cli.main([*TRAIN, "--epochs", "1"]) == 0
    assert result("run")["flop_utilization"] is None


def test_bfloat16_is_looked_for_on_the_card_that_was_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (9, 0), 1: (7, 5)}[device.index])
    assert [native_bf16(torch.device("cuda", index)) for index in (0, 1)] == [True, False]


def test_dali_that_fails_on_the_first_chunk_ends_in_a_sentence(monkeypatch, capsys):
    error = RuntimeError("Error in GPU operator `nvidia.dali.fn.warp_affine`")
    monkeypatch.setattr(DaliApplier, "submit", raising(error))
    assert cli.main(TRAIN) == 2
    assert f"DALI failed ({error}); choose --loader triton" in capsys.readouterr().err
