"""The files that the suite writes, one for each part; every key and type is checked on reading. Free of torch."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastcifar.analysis import results
from fastcifar.errors import FastcifarError
from fastcifar.runs.files import read_json, reading, write_text
from fastcifar.serialization import build

SCHEMA = "fastcifar.gpu_suite/1"
REMEDY = "remove it, and the suite measures that part anew"


@dataclass(frozen=True)
class Machine:
    """What the figures are of; what does not apply is None."""

    gpu: str | None
    capability: str | None
    memory_bytes: int | None
    """Of the GPU."""
    driver: str | None
    cuda: str | None
    """The version that torch was built for."""
    cudnn: int | None
    cpu: str
    cores: int
    system: str

    @property
    def slug(self) -> str:
        """The name of its files: `nvidia_h200`, or `cpu`."""
        return re.sub("[^a-z0-9]+", "_", self.gpu.lower()).strip("_") if self.gpu else "cpu"


class PartlyFailed(Exception):
    """Some of an item failed; `rows` are the others."""

    def __init__(self, rows: list[Any], text: str) -> None:
        super().__init__(text)
        self.rows = rows


@dataclass(frozen=True)
class TestFile:
    """What the GPU tests of one file came to."""

    __test__ = False

    file: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    failures: dict[str, str]
    """What each failed test said first."""
    reasons: dict[str, int]
    """Tests skipped, by the reason."""


@dataclass(frozen=True)
class OpSpeed:
    """An op of `kernels/` against what PyTorch has."""

    op: str
    case: str
    dtype: str
    direction: str
    """forward, or backward alone."""
    seconds: float
    times_rival: float
    times_compiled_rival: float | None
    bytes_moved: int | None
    """Of the forward."""
    bytes_per_second: float | None
    share_of_copy_bandwidth: float | None


@dataclass(frozen=True)
class InputSpeed:
    """Augmented, normalised batches from one CPU core, or from the GPU."""

    pipeline: str
    policy: str
    device: str
    images_per_second: float
    share_of_copy_bandwidth: float | None
    times: dict[str, float]
    """The rate as a multiple of each rival's."""


@dataclass(frozen=True)
class TrainingSpeed:
    """Epochs of training, loading included, compiling and capturing apart."""

    network: str
    batch_size: int
    images: int
    """Of an epoch."""
    images_per_second: float
    """Of the median epoch."""
    setup_seconds: float
    """Compiling and capturing."""
    precision: str
    loader: str
    compiled: bool
    captured: bool
    deterministic: bool
    """Whether only deterministic algorithms were allowed."""
    flop_utilization: float
    """Share of the rate of a large matrix product."""
    peak_memory_bytes: int | None
    parameters: int


@dataclass(frozen=True)
class PackedSpeed:
    """Several runs on one device, loading included, compiling and capturing apart."""

    network: str
    batch_size: int
    """Of each run."""
    way: str
    """processes, or streams of one process."""
    runs: int
    threads: int
    """CPU threads that a process has where each run is one."""
    captured: bool
    served: bool
    """Whether NVIDIA's Multi-Process Service was there."""
    images_per_second: float
    """Of all together."""
    times_one: float
    """The same over one run alone."""


@dataclass(frozen=True)
class NetworkProfile:
    """What `fastcifar profile` says of a network."""

    network: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a suite was asked for."""

    device: str = "cuda"
    """cuda or cpu."""
    smoke: bool = False
    """Only the first item of each part, and as little of it as shows that it runs: no figures."""
    recipes: tuple[str, ...] = ("*",)
    """Names or globs of what the time to accuracy is measured of."""


@dataclass(frozen=True)
class PartFile:
    """A part's file; times in seconds, sizes in bytes, shares and accuracies as fractions."""

    schema: str
    part: str
    state: Literal["complete", "partial"]
    """Partial where the time was up; the same call goes on."""
    date: str
    """Of the last item, UTC."""
    machine: Machine
    versions: dict[str, str]
    commit: str | None
    settings: Settings
    items: dict[str, float] = field(default_factory=dict)
    """Seconds of each item that is done, setting up included."""
    failures: dict[str, str] = field(default_factory=dict)
    """Items that failed, and how."""
    skipped: dict[str, str] = field(default_factory=dict)
    """What was not at hand, and so was left out."""
    rows: list[Any] = field(default_factory=list)
    """What was measured, of the part's own kind."""


def schema_of(row: type) -> str:
    """The schema of a file with such rows; runs of recipes have that which `tools/results_table` reads."""
    return results.SCHEMA if row is results.Row else SCHEMA


def read_part(path: Path, name: str, row: type) -> PartFile:
    """The file of the part `name`, whose rows are of the kind `row`.

    Raises:
        FastcifarError: it is not JSON, keys are missing or unknown, a value has another type, or it is another part's.
    """
    found = read_json(path, PartFile, REMEDY)
    if (found.schema, found.part) != (schema_of(row), name):
        raise FastcifarError(f"{path} is {found.schema} of {found.part}; expected {schema_of(row)} of {name}; {REMEDY}.")
    with reading(path, REMEDY):
        return dataclasses.replace(found, rows=rows_of(found.rows, row, path.name))


def read_rows(path: Path, row: type) -> list[Any]:
    """The rows of one item, as `suite.child` left them. Raises FastcifarError."""
    with reading(path, "the item is to be measured again"):
        return rows_of(json.loads(path.read_text("utf-8")), row, path.name)


def rows_of(entries: list[Any], row: type, where: str) -> list[Any]:
    """Rows from JSON. Raises ConfigError."""
    return [build(row, entry, f"{where}: rows", complete=True) for entry in entries]


def write_part(path: Path, content: PartFile) -> None:
    """Replaces the file as a whole. Raises FastcifarError."""
    write_text(path, json.dumps(dataclasses.asdict(content), indent=1, allow_nan=False) + "\n")
