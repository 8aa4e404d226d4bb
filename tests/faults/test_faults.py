"""What the package survives: some of each attack among the fast tests, and more of it as `pytest -m faults`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .__main__ import ATTACKS

ROOT = Path(__file__).parents[2]
KNOWN: dict[str, str] = {}
"""What is not survived yet, and why, by the name of the attack."""


def attacked(*arguments: str) -> str:
    """Attacks in a process of its own, which forks and has no other threads; returns what it prints."""
    command = [sys.executable, "-m", "tests.faults", *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


@pytest.fixture(scope="module")
def short_form() -> str:
    return attacked("--form", "short")


def check(name: str, printed: str) -> None:
    failures = [line for line in printed.splitlines() if line.startswith(f"{name}: ")]
    assert f"| {name} |" in printed, printed
    assert failures == []


EACH = [
    pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=KNOWN[name]) if name in KNOWN else ())
    for name in ATTACKS
]


@pytest.mark.parametrize("name", EACH)
def test_some_of_each_attack(short_form: str, name: str) -> None:
    check(name, short_form)


@pytest.mark.faults
@pytest.mark.parametrize("name", EACH)
def test_more_of_each_attack(name: str) -> None:
    check(name, attacked("--form", "middle", name))
