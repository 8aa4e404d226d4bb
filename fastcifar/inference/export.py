"""`fastcifar export`: writes a trained network as a file that does not need fastcifar."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastcifar.config import RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.device import Precision
from fastcifar.errors import ConfigError, FastcifarError, reason
from fastcifar.inference import PrecisionName
from fastcifar.inference.card import card, dataset_name
from fastcifar.inference.check import TOLERANCE, Check, check_file, find_test_set
from fastcifar.inference.classifier import Classifier, open_classifier
from fastcifar.inference.formats import FORMATS, Metadata, check_packages
from fastcifar.runs.console import percent
from fastcifar.runs.files import publish, write_text, writing
from fastcifar.runs.folder import Run
from fastcifar.runs.network import LoadOptions, TrainedNetwork, load_networks

CPU = torch.device("cpu")


class Deployed(nn.Module):
    """A network with its preprocessing before it and a softmax after it."""

    scale: Tensor
    offset: Tensor

    def __init__(self, network: TrainedNetwork) -> None:
        super().__init__()
        self.network = network.model.to(memory_format=torch.contiguous_format)
        scale, offset = network.normalization.affine(CPU)
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("offset", offset[:, None, None])
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (N, H, W, 3) -> probabilities float32 (N, classes)."""
        normalised = images.permute(0, 3, 1, 2).to(torch.float32) * self.scale + self.offset
        return self.network(normalised).softmax(dim=1)


class Mean(nn.Module):
    def __init__(self, members: Sequence[Deployed]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (N, H, W, 3) -> the mean of the members' probabilities, float32 (N, classes)."""
        return torch.stack([member(images) for member in self.members]).mean(dim=0)


@dataclass(frozen=True)
class Export:
    """The files written, and how they were checked."""

    files: tuple[Path, ...]
    weights: str
    """Name of a run's weights, or the number of an ensemble's networks."""
    check: Check


def lines_of(export: Export) -> Iterator[str]:
    check = export.check
    yield f"{export.weights}: equal to within {check.difference:.1e} on {check}"
    if score := check.score:
        accuracy = percent(score.correct / score.images)
        yield f"test accuracy of the file: {accuracy} of {score.images:,} images, computed in fp32"
        if score.precision:
            yield f"In {score.precision} the run gives another class to {score.differing:,} of them."
    yield from map(str, export.files)


def export_run(
    path: str | Path,
    name: str,
    out: str | Path | None = None,
    *,
    which: str | None = None,
    data_dir: Path | None = None,
    precision: PrecisionName | None = None,
    trust: bool = False,
    model: nn.Module | None = None,
    test_set: ImageSet | None = None,
) -> Export:
    """Writes a run's network and a model card, once the written file is known to give the same probabilities.

    An ensemble becomes one file that gives the mean probabilities of its members that vote. The file computes in fp32,
    and its own accuracy is measured where the test images are at hand.

    Args:
        path: folder of the run or the ensemble.
        name: of a format; see `inference.formats`.
        out: the file; by default `model` with the format's suffix in the folder `path`.
        which: the weights of a run; like `trust` and `model`, as in `runs.network.LoadOptions`.
        data_dir: where to look for the run's data set; the file is checked on its test images, or on random ones where
            it is not at hand.
        precision: also compare the file's classes with those of the run in this precision, on all test images.
        test_set: the images to check the file on, in place of those of the run's data set.

    Raises:
        FastcifarError: the run cannot be read or exported, packages are missing, `out` cannot be written, or the
            probabilities differ.
    """
    made, path, options = FORMATS[name], Path(path), LoadOptions(which, trust, model)
    out = Path(out) if out else path / f"model{made.suffix}"
    if out.suffix != made.suffix:
        raise ConfigError(f"--out {out} does not end in {made.suffix}, as files of the format {name} do; rename it.")
    check_packages(name)
    networks = load_networks(path, CPU, options)
    configs = [Run.open(network.path).config() for network in networks]
    dataset = dataset_name(configs[0]) if test_set is None else "the set given"
    test_set = find_test_set(configs[0], networks[0], data_dir, test_set)
    if precision and test_set is None:
        raise ConfigError("--precision compares classes of the test images, which are not at hand; give --data-dir.")
    other = open_classifier(path, options, precision) if precision else None
    program, metadata = trace(networks, path), describe(networks, configs[0])
    with writing(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        partial = Path(folder) / out.name
        made.write(program, metadata, partial)
        trained = Classifier(networks, CPU, Precision("fp32"))
        check = check_file(made.open(partial), trained, other, dataset, test_set)
        if not check.difference <= TOLERANCE:  # NaN too
            gap = f"probabilities off by {check.difference:.1e}, more than {TOLERANCE:.0e}"
            raise FastcifarError(f"{out} gave {gap}, and was not kept; try another format.")
        write_text(partial.with_name(f"{out.name}.md"), card(path, networks, configs, made, out, check))
        written = sorted(Path(folder).iterdir())
        for file in written:
            publish(file, out.parent / file.name)
    weights = networks[0].weights if len(networks) == 1 else f"{len(networks)} networks"
    return Export(tuple(out.parent / file.name for file in written), weights, check)


def describe(networks: Sequence[TrainedNetwork], config: RunConfig) -> Metadata:
    each = [{"arch": one.arch, "weights": one.weights, **vars(one.normalization)} for one in networks]
    classes, size = list(networks[0].classes), networks[0].image_size
    shared = {"dataset": dataset_name(config), "classes": classes, "image_size": size}
    return shared | (each[0] if len(each) == 1 else {"members": each})


def trace(networks: Sequence[TrainedNetwork], path: Path) -> ExportedProgram:
    """Traces the networks as a graph for any batch size. Raises FastcifarError where torch cannot export them."""
    size, members = networks[0].image_size, [Deployed(network) for network in networks]
    module = members[0] if len(members) == 1 else Mean(members)
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    try:
        with torch.no_grad():
            shapes = {"images": {0: Dim("batch", min=1)}}
            program = torch.export.export(module.eval(), (example,), dynamic_shapes=shapes)
    except Exception as error:  # on code it cannot follow, torch.export raises nearly anything
        raise FastcifarError(
            f"{path}'s network cannot be exported ({reason(error)}); write it without branches on tensors."
        ) from error
    for node in program.graph.nodes:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            # Bytes stay required, but not the CPU, so that the graph runs on a GPU too.
            node.kwargs = {"dtype": node.kwargs["dtype"]}
    program.graph_module.recompile()
    own = {"aten", "prims", None}
    foreign = {str(node.target) for node in program.graph.nodes if getattr(node.target, "namespace", None) not in own}
    if foreign:
        raise FastcifarError(
            f"{path}'s network has operations that plain torch lacks, {', '.join(sorted(foreign))}; do without them."
        )
    return program
