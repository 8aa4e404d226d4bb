"""Each check in made-up worlds, and the command in this one."""

import urllib.error
from pathlib import Path

import pytest
import torch

from fastcifar import cli
from fastcifar.diagnostics import doctor, machine
from fastcifar.diagnostics.doctor import Finding

GB = 2**30
CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("finding", "state", "text", "remedy"),
    [
        (doctor.check_python((3, 11, 9)), "ok", "3.11.9", None),
        (doctor.check_python((3, 13, 0)), "ok", "3.13.0", None),
        (doctor.check_python((3, 14, 0)), "warning", "3.14.0, for which", "install Python 3.11 to 3.13"),
        (doctor.check_python((3, 9, 1)), "warning", "3.9.1, for which", "install Python 3.11 to 3.13"),
        (doctor.check_torch("2.15.0+cu132", "13.2"), "ok", "2.15.0+cu132, built for CUDA 13.2", None),
        (doctor.check_torch("2.11.0", None), "ok", "2.11.0, built without CUDA", None),
        (
            doctor.check_torch("2.9.1", "12.8"),
            "warning",
            "made for 2.11 or later",
            "pip install --upgrade 'torch>=2.11'",
        ),
        (
            doctor.check_torch(None, None, "No module named 'torch'"),
            "error",
            "(No module named 'torch')",
            "pip install 'torch>=2.11'",
        ),
        (doctor.check_driver("580.65.06", 2, "13.0", ""), "ok", "580.65.06", None),
        (doctor.check_driver(None, 0, "13.0", "no driver"), "note", "the CPU trains", None),
        (
            doctor.check_driver("535.1", 0, "13.0", "too old"),
            "warning",
            "(too old)",
            "update the driver to 580 or later",
        ),
        (
            doctor.check_driver("470.1", 0, "12.8", ""),
            "warning",
            "no card it can use",
            "update the driver to 525 or later",
        ),
        (
            doctor.check_driver("580.1", 0, None, "not compiled"),
            "warning",
            "built without CUDA",
            "install torch with CUDA",
        ),
        (doctor.check_precision(True, "bf16", "cuda:0"), "ok", "bf16 on cuda:0, which has native bfloat16", None),
        (doctor.check_precision(False, "fp16", "cuda:0"), "note", "fp16 on cuda:0, which has no native bfloat16", None),
        (doctor.check_kernels(None, True), "ok", "run with Triton", None),
        (doctor.check_kernels(None, False), "ok", "on a CPU", None),
        (
            doctor.check_kernels("switched off by FASTCIFAR_KERNELS", True),
            "warning",
            "plain torch",
            "unset FASTCIFAR_KERNELS",
        ),
        (doctor.check_kernels("Triton is not installed", True), "warning", "not installed", "pip install triton"),
        (doctor.check_kernels("the card is older than sm_75", True), "warning", "older than sm_75", None),
        (
            doctor.check_kernels("a test of one failed: no compiler", True),
            "warning",
            "no compiler",
            "install a C compiler",
        ),
        (doctor.check_dali(True, None, True), "ok", "works", None),
        (doctor.check_dali(True, "no device", False), "note", "fails: no device", None),
        (doctor.check_dali(False, None, False), "note", "not installed", None),
        (doctor.check_compile(None), "ok", "works", None),
        (doctor.check_compile(None, tried=False), "note", "not tried", None),
        (
            doctor.check_compile("InvalidCxxCompiler"),
            "warning",
            "uncompiled: InvalidCxxCompiler",
            "install a C++ compiler",
        ),
        (doctor.check_memory(None, CPU, 2), "note", "does not tell", None),
        (doctor.check_memory(24 * GB, CARD, 2), "ok", "24.00 GiB for a run on cuda:0; resnet_prop takes about", None),
        (
            doctor.check_memory(GB, CARD, 2),
            "error",
            "1.00 GiB for a run on cuda:0: resnet_prop with 1",
            "close what else uses the card",
        ),
        (
            doctor.check_memory(GB, CPU, 4),
            "error",
            "1.00 GiB for a run on cpu: resnet_prop with 1",
            "close what else uses it",
        ),
        (doctor.check_disk(Path("a"), 50 * GB, True), "ok", "50.00 GiB free in a", None),
        (doctor.check_disk(Path("a"), GB, True), "warning", "1.00 GiB free in a", "make room for 2.00 GiB"),
        (doctor.check_disk(Path("a"), 50 * GB, False), "error", "a cannot be written", "give one with --out"),
        (doctor.check_threads(2, 2), "ok", "2 on 2 CPUs", None),
        (doctor.check_threads(8, 1), "warning", "8 on 1 CPU,", "--threads 1"),
    ],
    ids=lambda value: f"{value.name} {value.state}" if isinstance(value, Finding) else None,
)
def test_findings(finding, state, text, remedy):
    assert finding.state == state
    assert text in finding.text
    assert finding.remedy is None if remedy is None else remedy in finding.remedy


def test_dali_is_missed_on_a_gpu_where_there_is_one_to_install(monkeypatch):
    for system, state in (("Linux", "warning"), ("Windows", "note")):
        monkeypatch.setattr(doctor.platform, "system", lambda system=system: system)
        finding = doctor.check_dali(False, None, True)
        assert (finding.state, finding.remedy is None) == (state, state == "note")


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((6, 1), ["sm_75", "sm_80"], False),
        ((8, 0), ["sm_86", "compute_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90", "sm_100"], False),
        ((12, 0), ["sm_120"], True),
    ],
)
def test_which_cards_torch_is_built_for(capability, built, expected):
    assert machine.runs_on(capability, built) is expected
    for chosen in (True, False):
        finding = doctor.check_card(1, "Titan", capability, built, GB, 2 * GB, chosen)
        assert finding.name == "cuda:1"
        assert f"Titan, sm_{capability[0]}{capability[1]}, 1.00 GiB of 2.00 GiB free" in finding.text
        assert finding.state == ("ok" if expected else "error" if chosen else "warning")


def test_data_that_is_not_at_hand_must_be_within_reach(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FASTCIFAR_MIRRORS", "http://mirror.invalid/data")
    asked = []
    finding = doctor.check_data(None, lambda address: asked.append(address) or "mirror" in address)
    assert finding.state == "note"
    assert "http://mirror.invalid/data/cifar-10-python.tar.gz" in finding.text
    assert len(asked) == 2
    finding = doctor.check_data(None, lambda address: False)
    assert finding.state == "error"
    assert "put cifar-10-python.tar.gz into" in finding.remedy


def test_damaged_data_is_an_error(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / name).write_bytes(b"nothing")
    monkeypatch.setenv("FASTCIFAR_DATA", str(tmp_path))
    finding = doctor.check_data(None, lambda address: True)
    assert finding.state == "error"
    assert finding.remedy
    monkeypatch.setenv("FASTCIFAR_DATA", str(tmp_path / "nowhere"))
    assert "which is no folder" in doctor.check_data(None, lambda address: True).text


@pytest.mark.data
def test_the_real_data_is_found_and_read():
    finding = doctor.check_data(None, lambda address: pytest.fail("nothing has to be fetched"))
    assert finding.state == "ok"
    assert "every file whole" in finding.text


def test_remedies_come_by_gravity_and_then_in_order():
    findings = [
        Finding(*row)
        for row in (("a", "note", "", "1"), ("b", "warning", "", "2"), ("c", "error", "", "3"), ("d", "ok", ""))
    ]
    findings += [Finding("e", "error", "", "5"), Finding("f", "warning", "")]
    assert [finding.name for finding in doctor.remedies(findings)] == ["c", "e", "b", "a"]


@pytest.mark.parametrize(
    ("state", "status", "can"), [("error", 1, "cannot run"), ("warning", 0, "can run"), ("note", 0, "can run")]
)
def test_only_errors_are_the_exit_status(state, status, can, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda *arguments: [Finding("disk", state, "full [of things]", "make room")])
    assert cli.main(["doctor"]) == status
    printed = capsys.readouterr().out
    assert f"fastcifar train --arch resnet_prop {can} here." in printed
    assert "full [of things]" in printed
    assert "1. disk: make room." in printed


def test_without_torch_nothing_else_is_looked_at(monkeypatch, capsys):
    monkeypatch.setattr(machine, "torch_at_hand", lambda: (None, None, "No module named 'torch'"))
    assert [finding.state for finding in doctor.examine()] == ["ok", "error"]
    assert cli.main(["doctor", "--quick"]) == 1
    assert "torch: pip install" in capsys.readouterr().out


def test_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCIFAR_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "answers", lambda address: True)
    findings = {finding.name: finding for finding in doctor.examine("cpu", quick=True)}
    order = [name for name in findings if not name.startswith("cuda:")]
    expected = [
        "python",
        "torch",
        "driver",
        "precision",
        "kernels",
        "dali",
        "compile",
        "data",
        "memory",
        "disk",
        "threads",
    ]
    assert order == expected
    assert findings["kernels"].state == "ok"
    assert torch.__version__ in findings["torch"].text
    assert findings["data"].state == "note"


def test_a_device_that_is_not_there_ends_the_examination():
    finding = doctor.examine("cuda:77", quick=True)[-1]
    assert (finding.name, finding.state) == ("device", "error")
    assert "cuda:77 was not found" in finding.text
    assert finding.remedy == "choose another or --device auto"
    assert cli.main(["doctor", "--device", "gpu"]) == 2


def test_a_compiler_that_fails_is_seen(monkeypatch):
    def compile_(function):
        raise RuntimeError("no g++\nand much more")

    monkeypatch.setattr(torch, "compile", compile_)
    assert machine.compile_obstacle(torch.device("cpu")) == "no g++"
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x + 1)
    assert "Tensor-likes are not close" in machine.compile_obstacle(torch.device("cpu"))


def test_usable_cpus_are_those_of_the_quota(monkeypatch):
    files = {"/sys/fs/cgroup/cpu.max": "150000 100000\n"}
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "Path", lambda *parts: FakePath("/".join(parts), files.__getitem__))
    assert machine.usable_cpus() == 1
    files["/sys/fs/cgroup/cpu.max"] = "400000 100000\n"
    assert machine.usable_cpus() == 4
    files["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    assert machine.usable_cpus() == 8


class FakePath:
    def __init__(self, path: str, read) -> None:
        self.path, self.read = path, read

    def read_text(self) -> str:
        return self.read(self.path)


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024", "550.54.14"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", "580.95.05"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54  Tue", "535.54"),
    ],
)
def test_the_driver_is_read_from_linux(line, version, monkeypatch):
    monkeypatch.setattr(
        machine, "Path", lambda *_: FakePath("", lambda path: f"{line}\nGCC version:  gcc version 12.3.0\n")
    )
    assert machine.driver_version() == version


def test_an_address_answers_or_does_not(monkeypatch):
    def refuse(*arguments, **options):
        raise urllib.error.URLError("refused")

    monkeypatch.setattr(machine.urllib.request, "urlopen", refuse)
    assert not machine.answers("http://mirror.invalid/file")
    assert not machine.answers("no address")
