"""The description of a machine, from made-up files and answers."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import torch

from fastcifar.diagnostics import machine

CPU = torch.device("cpu")


@pytest.fixture
def system_file(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "file"
    monkeypatch.setattr(machine, "Path", lambda name: path)
    return path


def test_a_compiler_that_fails_is_seen(monkeypatch):
    def compile_(function):
        raise RuntimeError("no g++\nand much more")

    monkeypatch.setattr(torch, "compile", compile_)
    assert machine.compile_obstacle(CPU).startswith("no g++")
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x + 1)
    assert "Tensor-likes are not close" in machine.compile_obstacle(CPU)


@pytest.mark.parametrize(("quota", "cpus"), [("150000 100000\n", 1), ("400000 100000\n", 4), ("max 100000\n", 8)])
def test_usable_cpus_are_those_of_the_quota(quota, cpus, system_file, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    system_file.write_text(quota)
    assert machine.usable_cpus() == cpus


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024", "550.54.14"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", "580.95.05"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54  Tue", "535.54"),
    ],
)
def test_the_driver_is_read_from_linux(line, version, system_file):
    system_file.write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    assert machine.driver_version() == version


def test_an_address_answers_or_does_not(monkeypatch):
    def refuse(*arguments, **options):
        raise urllib.error.URLError("refused")

    monkeypatch.setattr(machine.urllib.request, "urlopen", refuse)
    assert not machine.answers("http://mirror.invalid/file")
    assert not machine.answers("no address")
