"""The checks in made-up circumstances, and the command on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastcifar import cli
from fastcifar.diagnostics import doctor, machine
from fastcifar.diagnostics.doctor import MESSAGES, REMEDIES, Finding

GB = 2**30
CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
ELSEWHERE = Path("a")


@pytest.mark.parametrize(
    ("finding", "code", "told"),
    [
        (doctor.check_torch("2.15.0+cu132", "13.2"), "torch", "2.15.0+cu132, built for CUDA 13.2"),
        (doctor.check_torch("2.11.0", None), "torch_for_cpu", "2.11.0, built without CUDA"),
        (doctor.check_torch(None, None, "No module"), "torch_absent", "cannot be imported (No module)"),
        (doctor.check_driver("580.65.06", 2, "13.0", ""), "driver", "580.65.06"),
        (doctor.check_driver(None, 0, "13.0", "no driver"), "driver_absent", "the CPU trains"),
        (doctor.check_driver("535.1", 0, "13.0", "too old"), "driver_unusable", "update the driver to 580 or later"),
        (doctor.check_driver("470.1", 0, "12.8", "too old"), "driver_unusable", "update the driver to 525 or later"),
        (doctor.check_driver("580.1", 0, None, "no CUDA"), "driver_without_cuda", "install torch with CUDA"),
        (doctor.check_precision(True, "bf16", "cuda:0"), "bf16_native", "bf16 on cuda:0, which has native"),
        (doctor.check_precision(False, "fp16", "cuda:0"), "bf16_absent", "fp16 on cuda:0, which has no native"),
        (doctor.check_kernels(None, True), "kernels_on_gpu", "run with Triton"),
        (doctor.check_kernels(None, False), "kernels_on_cpu", "on a CPU"),
        (doctor.check_kernels(("card_too_old", ""), True), "card_too_old", "older than sm_75"),
        (doctor.check_kernels(("kernel_failed", "no compiler"), True), "kernel_failed", "failed: no compiler"),
        (doctor.check_dali(None, True), "dali", "works"),
        (doctor.check_dali(None, False), "dali_on_cpu", "a CPU torch augments"),
        (doctor.check_dali(("failed", "no device"), False), "dali_failed_unneeded", "fails: no device"),
        (doctor.check_dali(("absent", ""), False), "dali_absent_unneeded", "not installed"),
        (doctor.check_compiler(None), "compiler", "works"),
        (doctor.check_compiler("no g++"), "compiler_failed", "uncompiled: no g++ | install a C++ compiler ("),
        (doctor.check_memory(None, CPU, 2), "memory_unknown", "does not tell"),
        (doctor.check_memory(24 * GB, CARD, 2), "memory", "24.00 GiB for a run on cuda:0; resnet_prop takes about"),
        (doctor.check_memory(GB, CARD, 2), "card_memory_low", "1.00 GiB for a run on cuda:0: resnet_prop with 1"),
        (doctor.check_memory(GB, CPU, 4), "memory_low", "1.00 GiB for a run on cpu: resnet_prop with 1"),
        (doctor.check_disk(ELSEWHERE, 50 * GB, True), "disk", "50.00 GiB free in a"),
        (doctor.check_disk(ELSEWHERE, GB, True), "disk_low", "1.00 GiB free in a | make room for 2.00 GiB"),
        (doctor.check_disk(ELSEWHERE, 50 * GB, False), "disk_unwritable", "a cannot be written"),
        (doctor.check_threads(2, 2), "threads", "2 on 2 CPUs"),
        (doctor.check_threads(8, 1), "threads_too_many", "--threads 1"),
    ],
    ids=lambda value: value.code if isinstance(value, Finding) else "",
)
def test_findings(finding, code, told):
    assert finding.code == code
    assert told in f"{finding.text} | {finding.remedy}"


def test_every_problem_has_a_remedy():
    problems = {code for code, (state, _) in MESSAGES.items() if state in ("error", "warning")}
    assert problems - {"card_too_old"} == set(REMEDIES)


@pytest.mark.parametrize(("system", "code"), [("Linux", "dali_absent"), ("Windows", "dali_absent_unneeded")])
def test_dali_is_missed_on_a_gpu_where_there_is_one_to_install(system, code, monkeypatch):
    monkeypatch.setattr(doctor.platform, "system", lambda: system)
    assert doctor.check_dali(("absent", ""), True).code == code


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((6, 1), ["sm_75", "sm_80"], False),
        ((8, 0), ["sm_86", "compute_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90", "sm_100"], False),
    ],
)
def test_which_cards_torch_is_built_for(capability, built, expected):
    assert machine.runs_on(capability, built) is expected
    for chosen, unsupported in ((True, "card_unsupported"), (False, "other_card_unsupported")):
        finding = doctor.check_card(1, "Titan", capability, built, GB, 2 * GB, chosen)
        assert (finding.subject, finding.code) == ("cuda:1", "card" if expected else unsupported)
        assert f"Titan, sm_{capability[0]}{capability[1]}, 1.00 GiB of 2.00 GiB free" in finding.text


def test_data_that_is_not_at_hand_must_be_within_reach(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FASTCIFAR_MIRRORS", "http://mirror.invalid/data")
    finding = doctor.check_data(None, lambda address: "mirror" in address)
    assert finding.code == "data_to_fetch"
    assert "http://mirror.invalid/data/cifar-10-python.tar.gz" in finding.text
    finding = doctor.check_data(None, lambda address: False)
    assert finding.code == "data_unreachable"
    assert "no cifar-10-batches-py or cifar-10-python.tar.gz in" in finding.text
    assert "put cifar-10-python.tar.gz into" in finding.remedy


def test_damaged_data_is_an_error(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / name).write_bytes(b"nothing")
    monkeypatch.setenv("FASTCIFAR_DATA", str(tmp_path))
    finding = doctor.check_data(None, lambda address: True)
    assert finding.code == "data_damaged"
    assert finding.remedy
    monkeypatch.setenv("FASTCIFAR_DATA", str(tmp_path / "nowhere"))
    assert "which is no folder" in doctor.check_data(None, lambda address: True).text


@pytest.mark.data
def test_the_real_data_is_found_and_read():
    finding = doctor.check_data(None, lambda address: pytest.fail("nothing has to be fetched"))
    assert finding.code == "data"


def test_remedies_come_by_gravity_and_then_in_order():
    codes = ["dali_absent", "compiler_failed", "disk_unwritable", "disk", "memory_low", "card_too_old"]
    found = doctor.remedies([Finding(code, code, compiler="g++") for code in codes])
    assert [finding.code for finding in found] == ["disk_unwritable", "memory_low", "dali_absent", "compiler_failed"]


@pytest.mark.parametrize(("code", "status", "can"), [("disk_unwritable", 1, "cannot run"), ("disk_low", 0, "can run")])
def test_only_errors_are_the_exit_status(code, status, can, monkeypatch, capsys):
    finding = Finding("disk", code, folder="[of things]", free="1 GiB", needed="2 GiB")
    monkeypatch.setattr(doctor, "examine", lambda *arguments: [finding])
    assert cli.main(["doctor"]) == status
    printed = capsys.readouterr().out
    assert f"fastcifar train --arch resnet_prop {can} here." in printed
    assert finding.text in printed
    assert f"1. disk: {finding.remedy}." in printed


def test_without_torch_nothing_else_is_looked_at(monkeypatch, capsys):
    monkeypatch.setattr(machine, "torch_at_hand", lambda: (None, None, "No module named 'torch'"))
    assert cli.main(["doctor", "--quick"]) == 1
    printed = capsys.readouterr().out
    assert "torch: pip install" in printed
    assert "dali" not in printed


def test_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCIFAR_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "answers", lambda address: True)
    findings = {finding.subject: finding for finding in doctor.examine("cpu", quick=True)}
    order = "python torch driver precision kernels dali compile data memory disk threads".split()
    assert [subject for subject in findings if not subject.startswith("cuda:")] == order
    assert findings["kernels"].code == "kernels_on_cpu"
    assert torch.__version__ in findings["torch"].text
    assert findings["data"].code == "data_to_fetch"


def test_a_device_that_is_not_there_ends_the_examination():
    finding = doctor.examine("cuda:77", quick=True)[-1]
    assert (finding.subject, finding.code) == ("device", "device_absent")
    assert "cuda:77 was not found" in finding.text
    assert finding.remedy == "choose another or --device auto"
    assert cli.main(["doctor", "--device", "gpu"]) == 2
