"""The export formats: how each file is written, run again, and loaded without fastcifar."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fastcifar.checks import given
from fastcifar.errors import ConfigError
from fastcifar.inference.check import Classify

Metadata = dict[str, Any]
"""A network's classes, image_size, dataset, arch, weights, mean and std as JSON; the last four by ensemble member."""


@dataclass(frozen=True)
class Format:
    suffix: str
    packages: tuple[str, ...]
    """Packages beyond fastcifar's own that writing and checking need."""
    write: Callable[[ExportedProgram, Metadata, Path], None]
    open: Callable[[Path], Classify]
    usage: str
    """Python code that loads {file}, through {module} where needed, and classifies `images`."""


def write_torch(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Saves the program with `torch.export`, with the metadata as an extra file."""
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})


def open_torch(path: Path) -> Classify:
    return torch.export.load(path).module()


def write_onnx(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Writes an ONNX graph from "images" to "probabilities", with its weights inside."""
    made = given(
        torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"], output_names=["probabilities"])
    )
    made.model.metadata_props.update(as_text(metadata))
    made.save(str(path), external_data=False)


def open_onnx(path: Path) -> Classify:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_safetensors(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Writes the weights, and beside them the network as a Python file that needs torch and safetensors alone."""
    stored = {**program.constants, **program.state_dict}
    specs = program.graph_signature.input_specs
    names = [given(spec.target) for spec in specs if spec.kind is not InputKind.USER_INPUT]
    weights = {name: stored[name].detach().clone(memory_format=torch.contiguous_format) for name in names}
    save_file(weights, path, as_text(metadata))
    module_beside(path).write_text(source_of(program, metadata, path), encoding="utf-8")


def open_safetensors(path: Path) -> Classify:
    classify, weights = runpy.run_path(str(module_beside(path)))["classify"], load_file(path)
    return lambda images: classify(weights, images)


def module_beside(path: Path) -> Path:
    return path.with_name(re.sub(r"\W|^(?=\d)", "_", path.stem) + "_network.py")


def as_text(metadata: Metadata) -> dict[str, str]:
    """Turns the metadata into strings, as JSON where they are not strings already."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


SOURCE = '''"""A trained network in plain PyTorch, written by `fastcifar export`. It needs torch and
safetensors, and no fastcifar.

    weights = load({file})
    probabilities = classify(weights, images)
"""

{imports}

CLASSES = {classes}


def classify(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Images uint8 (N, {size}, {size}, 3), RGB, on the device of the weights -> probabilities float32 (N, {count})."""
{body}
'''

IMPORTS = {
    "inf": "from math import inf",
    "nan": "from math import nan",
    "torch": "\nimport torch",
    "load": "from safetensors.torch import load_file as load",
}


def source_of(program: ExportedProgram, metadata: Metadata, path: Path) -> str:
    """Writes the program as Python: its graph of ATen operations. Text from the run occurs only as literals."""
    specs = program.graph_signature.input_specs
    stored = [spec for spec in specs if spec.kind is not InputKind.USER_INPUT]
    taken = [f"    {spec.arg.name} = weights[{spec.target!r}]" for spec in stored]
    lines = program.graph_module.graph.python_code("self").src.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("def forward("))
    input_name = next(spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT)
    computed = [
        re.sub(r"^    return \((\w+),\)$", r"    return \1", line) for line in lines[start + 1 :] if line.strip()
    ]
    body = "\n".join([*([] if input_name == "images" else [f"    {input_name} = images"]), *taken, *computed])
    needed = [line for name, line in IMPORTS.items() if name in ("torch", "load") or re.search(rf"\b{name}\b", body)]
    return SOURCE.format(
        file=json.dumps(path.name),
        imports="\n".join(needed).strip(),
        classes=json.dumps(metadata["classes"], indent=4),
        size=metadata["image_size"],
        count=len(metadata["classes"]),
        body=body,
    )


USE_SAFETENSORS = """from {module} import classify, load

probabilities = classify(load({file!r}), images)"""

USE_TORCH = """import torch

probabilities = torch.export.load({file!r}).module()(images)"""

USE_ONNX = """import onnxruntime

session = onnxruntime.InferenceSession({file!r})
(probabilities,) = session.run(None, {{"images": images}})  # numpy arrays"""

FORMATS: dict[str, Format] = {
    "safetensors": Format(".safetensors", (), write_safetensors, open_safetensors, USE_SAFETENSORS),
    "torch": Format(".pt2", (), write_torch, open_torch, USE_TORCH),
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), write_onnx, open_onnx, USE_ONNX),
}


def check_packages(name: str) -> None:
    """Raises ConfigError, which says how to install them, where packages of the format `name` are missing."""
    if missing := [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]:
        raise ConfigError(f"exporting to {name} needs {', '.join(missing)}; pip install 'fastcifar[export]'.")
