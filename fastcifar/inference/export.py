"""`fastcifar export`: a trained network as a file that needs no fastcifar."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastcifar.config import RunConfig
from fastcifar.data.sources import load_dataset
from fastcifar.engine.precision import Precision
from fastcifar.errors import ConfigError, DataError, FastcifarError
from fastcifar.inference.card import card, dataset_name
from fastcifar.inference.classifier import Classifier
from fastcifar.inference.formats import FORMATS, Classify, check_packages
from fastcifar.runs.files import publish, reason, write_text, writing
from fastcifar.runs.folder import Run
from fastcifar.runs.network import TrainedNetwork, load_network

TOLERANCE = 1e-5
"""Of a probability, in float32."""
CHECKED = 64
"""Images that an export is compared on."""
BATCHES = (1, 7, CHECKED)
"""Of these images, as the batch sizes that an export must take."""


class Deployed(nn.Module):
    """A network with its preprocessing before it and the softmax behind it."""

    def __init__(self, network: TrainedNetwork) -> None:
        super().__init__()
        self.network = network.model.to(memory_format=torch.contiguous_format)
        scale, offset = network.normalization.affine(torch.device("cpu"))
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("offset", offset[:, None, None])
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) -> probabilities float32 (N, classes)."""
        normalised = images.permute(0, 3, 1, 2).to(torch.float32) * self.scale + self.offset
        return self.network(normalised).softmax(dim=1)


@dataclass(frozen=True)
class Export:
    """What was written, and how it was checked."""

    files: tuple[Path, ...]
    weights: str
    checked: str
    """On what images."""
    difference: float
    """The largest of any probability to the trained network's."""


def export_run(
    path: Path, name: str, out: Path | None = None, *, which: str | None = None, data_dir: Path | None = None, trust: bool = False
) -> Export:
    """Writes the network of the run at `path`, with a model card beside it, once the written file gives the same probabilities.

    Args:
        path: the run's folder.
        name: of a format; see `inference.formats`.
        out: the file; `model` with the format's suffix in the run's folder by default.
        which: the weights; see `runs.network.load_network`.
        data_dir: where to look for the run's data set, whose test images the file is checked on; random ones where it is not at hand.
        trust: whether code that comes with the run may be executed.

    Raises:
        FastcifarError: the run cannot be read or exported, packages are missing, `out` cannot be written, or the probabilities differ.
    """
    made = FORMATS[name]
    out = out or path / f"model{made.suffix}"
    if out.suffix != made.suffix:
        raise ConfigError(f"--out {out} does not end in {made.suffix}, as files of the format {name} do; rename it.")
    check_packages(name)
    run, cpu = Run.open(path), torch.device("cpu")
    config, network = run.config(), load_network(path, cpu, which, trust=trust)
    images, checked = sample_images(config, data_dir, network.image_size)
    expected = Classifier(path, network, cpu, Precision("fp32"))(images).softmax(dim=1)
    program = trace(network, path)
    metadata = {
        "arch": network.arch,
        "weights": network.weights,
        "dataset": dataset_name(config),
        "classes": list(network.classes),
        "image_size": network.image_size,
        **vars(network.normalization),
    }
    parameters = sum(parameter.numel() for parameter in network.model.parameters())
    with writing(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        partial = Path(folder) / out.name
        made.write(program, metadata, partial)
        difference = largest_difference(made.open(partial), images, expected, out)
        text = card(run, made, metadata, out, parameters, checked, difference)
        write_text(partial.with_name(f"{out.name}.md"), text)
        written = sorted(Path(folder).iterdir())
        for file in written:
            publish(file, out.parent / file.name)
    return Export(tuple(out.parent / file.name for file in written), network.weights, checked, difference)


def trace(network: TrainedNetwork, path: Path) -> ExportedProgram:
    """The deployed network as a graph of PyTorch's own operations, for any batch size. Raises FastcifarError where it is none."""
    size = network.image_size
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    try:
        with torch.no_grad():
            shapes = {"images": {0: Dim("batch", min=1)}}
            program = torch.export.export(Deployed(network).eval(), (example,), dynamic_shapes=shapes)
    except Exception as error:  # on code it cannot follow, torch.export raises nearly anything
        raise FastcifarError(f"{path}'s network cannot be exported ({reason(error)}); write it without branches on tensors.") from error
    for node in program.graph.nodes:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            node.kwargs = {"dtype": node.kwargs["dtype"]}  # bytes stay required, but not the CPU, so that the graph runs on a GPU too
    program.graph_module.recompile()
    own = {"aten", "prims", None}
    foreign = {str(node.target) for node in program.graph.nodes if getattr(node.target, "namespace", None) not in own}
    if foreign:
        raise FastcifarError(f"{path}'s network has operations that plain torch lacks, {', '.join(sorted(foreign))}; do without them.")
    return program


def sample_images(config: RunConfig, data_dir: Path | None, size: int) -> tuple[Tensor, str]:
    """uint8 (CHECKED, size, size, 3), and what they are: test images of the run's data set, or random ones where it is not at hand."""
    try:
        images = load_dataset(config.data.dataset, "test", data_dir or config.data.data_dir, download=False).images[:CHECKED]
        if images.shape == (CHECKED, size, size, 3):
            return images, f"the first {CHECKED} test images of {dataset_name(config)}"
    except DataError:
        pass
    noise = torch.randint(0, 256, (CHECKED, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return noise, f"{CHECKED} random images, since {dataset_name(config)} was not at hand"


def largest_difference(classify: Classify, images: Tensor, expected: Tensor, out: Path) -> float:
    """Of the probabilities of `images`, in batches of several sizes. Raises FastcifarError where it exceeds the tolerance."""
    with torch.inference_mode():
        gaps = [(classify(images[:count]) - expected[:count]).abs().max().item() for count in BATCHES]
    difference = max(gaps)
    if not difference <= TOLERANCE:  # NaN too
        gap = f"probabilities off by {difference:.1e}, more than {TOLERANCE:.0e}"
        raise FastcifarError(f"{out} gave {gap}, and was not kept; try another format.")
    return difference
