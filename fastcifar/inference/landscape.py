"""`fastcifar landscape`: the training loss around the weights of runs, along two random directions.

Source: Li et al. 2018, arXiv:1712.09913, section 4, "filter normalization". A random direction has each filter scaled
to the norm of the weights' filter, since networks that differ by such scales compute the same; without it, sharpness
would be compared by them. Norms and biases stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.checks import check_range
from fastcifar.data.image_set import ImageSet
from fastcifar.data.sources import load_dataset
from fastcifar.device import resolve_device, resolve_precision
from fastcifar.errors import ConfigError
from fastcifar.inference.classifier import Classifier
from fastcifar.plots import plot_landscape, save
from fastcifar.runs.files import write_text
from fastcifar.runs.folder import Run
from fastcifar.runs.network import DEFAULT, LoadOptions, TrainedNetwork, read_network


@dataclass(frozen=True)
class Grid:
    """Where the loss is computed: `points` x `points` places, up to `radius` from the weights along each direction.

    At 1, a direction is as long as the weights, filter by filter.
    """

    points: int = 21
    """Odd, so that the weights themselves are one of the places."""
    radius: float = 1.0
    seed: int = 0
    """Seed of the directions."""

    def __post_init__(self) -> None:
        check_range("points", self.points, 3)
        check_range("radius", self.radius, 0, exclusive=True)
        if self.points % 2 == 0:
            raise ConfigError(f"points is {self.points}; give an odd number, so that the weights are in the middle.")

    @property
    def places(self) -> list[float]:
        """Coordinates along each direction."""
        return torch.linspace(-self.radius, self.radius, self.points, dtype=torch.float64).tolist()


@dataclass(frozen=True, eq=False)
class Surface:
    name: str
    """The run's folder."""
    losses: Tensor
    """Mean cross-entropy at each place of the grid, float64 (points, points), by the first direction, then the second;
    infinite or NaN where the network overflows."""
    changed: bool = False
    """Whether the images are not those that the run was trained on."""

    @property
    def centre(self) -> float:
        """The loss at the weights themselves."""
        middle = len(self.losses) // 2
        return self.losses[middle, middle].item()

    @property
    def edge(self) -> float:
        """The mean loss at the four places at the distance of the radius along one direction."""
        middle = len(self.losses) // 2
        return self.losses[[0, -1, middle, middle], [middle, middle, 0, -1]].mean().item()


def draw_landscapes(
    runs: Sequence[str | Path],
    out: str | Path,
    grid: Grid = Grid(),
    *,
    images: int = 1000,
    data_dir: Path | None = None,
    options: LoadOptions = DEFAULT,
    train_set: ImageSet | None = None,
) -> list[Surface]:
    """Computes the landscapes of `runs` and draws them side by side in `out`, a .png file, with the numbers in a .json.

    Args:
        images: how many training images, evenly spread over the set and not augmented, the loss is the mean of.
        train_set: the images to take them from, in place of those of each run's data set.

    Raises:
        FastcifarError: a run cannot be read, or the files cannot be written.
    """
    check_range("images", images, 1)
    out, device = Path(out), resolve_device("auto")
    if out.suffix.lower() != ".png":
        raise ConfigError(f"{out} is no name of a .png file; give one, such as landscape.png.")
    found = []
    for path in map(Path, runs):
        network, data = read_network(path, options).load(device, options.weights), Run.open(path).config().data
        dataset = load_dataset(data.dataset, "train", data_dir or data.data_dir) if train_set is None else train_set
        chosen = torch.linspace(0, len(dataset) - 1, min(images, len(dataset))).long()
        losses = loss_surface(network, dataset.images[chosen], dataset.labels[chosen], device, grid)
        found.append(Surface(str(path), losses, network.knows("train", dataset) is False))
    save(out, plot_landscape, {one.name: one.losses.numpy() for one in found}, grid.places)
    numbers = {"places": grid.places, "seed": grid.seed, "losses": {one.name: one.losses.tolist() for one in found}}
    write_text(out.with_suffix(".json"), json.dumps(numbers) + "\n")
    return found


@torch.no_grad()
def loss_surface(network: TrainedNetwork, images: Tensor, labels: Tensor, device: torch.device, grid: Grid) -> Tensor:
    """Mean cross-entropy of images uint8 (N, H, W, 3) with labels int64 (N,) over the grid: float64 (points, points).

    It is computed in float32, with the running statistics that belong to the weights, which are unchanged afterwards.
    """
    classifier = Classifier((network,), device, resolve_precision("fp32", device))
    first, second = (filter_normalized(network.model, grid.seed + number) for number in (0, 1))
    weights = {name: parameter.clone() for name, parameter in network.model.named_parameters()}
    losses = torch.empty(grid.points, grid.points, dtype=torch.float64)
    for i, x in enumerate(grid.places):
        for j, y in enumerate(grid.places):
            for name, parameter in network.model.named_parameters():
                parameter.copy_(weights[name] + x * first[name] + y * second[name])
            logits = torch.cat([classifier(batch).cpu() for batch in images.split(classifier.batch_size)])
            losses[i, j] = F.cross_entropy(logits.double(), labels)
    for name, parameter in network.model.named_parameters():
        parameter.copy_(weights[name])
    return losses


def filter_normalized(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A normal random direction by parameter, each filter (or row) of it as long as the model's; 0 for vectors."""
    generator, direction = torch.Generator().manual_seed(seed), {}
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
        dims = tuple(range(1, parameter.ndim))
        if not dims:
            direction[name] = torch.zeros_like(parameter)
            continue
        norm = torch.linalg.vector_norm(parameter, dim=dims, keepdim=True)
        direction[name] = drawn * (norm / torch.linalg.vector_norm(drawn, dim=dims, keepdim=True))
    return direction
