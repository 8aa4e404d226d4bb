"""Pictures of the effects of augmentation policies, drawn by the code that trains."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcifar.augment.automatic import Operation
from fastcifar.augment.geometry import ONE
from fastcifar.augment.mixing import mix_images
from fastcifar.augment.policy import parse
from fastcifar.augment.random import Key
from fastcifar.augment.sampling import Mixing, Params, sample
from fastcifar.augment.torch_apply import augmented
from fastcifar.checks import check_range
from fastcifar.data.image_set import ImageSet
from fastcifar.errors import ConfigError
from fastcifar.output import show
from fastcifar.plots import COLUMNS, plot_images, save, shortened

CAPTION = 16
"""Most letters of a class's name above an image."""
VALUELESS = {Operation.IDENTITY, Operation.AUTO_CONTRAST, Operation.INVERT, Operation.EQUALIZE}


def preview(
    policies: Sequence[str],
    dataset: ImageSet,
    path: Path,
    *,
    seed: int = 0,
    epoch: int = 0,
    count: int = 12,
    show_params: bool = False,
) -> list[Path]:
    """Draws `count` images, evenly spread over `dataset`, as each policy transforms them in one epoch.

    One policy makes a page of pairs, original above result, with their classes. Several also make a sheet with a row
    for each.

    Args:
        policies: texts such as "standard" or "crop:4,cutout:4x4".
        dataset: on the CPU.
        path: a .png file; or a folder, which gets a page for each policy and, for several, the sheet as all.png.
        seed, epoch: of the random draws.
        show_params: print what was drawn for each image.

    Returns:
        the files written.

    Raises:
        ConfigError: a policy that cannot be read, none at all, a number out of range, or a `path` that is neither.
        FastcifarError: a page cannot be drawn or written.
    """
    if not policies:
        raise ConfigError("there is no policy to preview; name one, such as standard.")
    check_range("seed", seed, 0, 2**32 - 1)
    check_range("epoch", epoch, 0, 2**32 - 1)
    check_range("count", count, 1, 1000)
    is_file = path.suffix.lower() == ".png"
    if path.suffix and not is_file and not path.is_dir():
        raise ConfigError(f"{path} is neither a .png file nor a folder; end it in .png, or leave the ending out.")
    index = torch.arange(min(count, len(dataset))) * len(dataset) // min(count, len(dataset))
    views = [view(name, dataset, Key(seed, epoch), index) for name in dict.fromkeys(policies)]
    if show_params:
        show("\n\n".join(one.text(index) for one in views))
    pages = {"all.png": sheet_of(views)} if len(views) > 1 else {}
    if not is_file or not pages:
        pages |= {f"{re.sub(r'[^A-Za-z0-9.]+', '_', one.name)}.png": pairs_of(one) for one in views}
    files = {path if is_file else path / name: page for name, page in pages.items()}
    for file, page in files.items():
        save(file, plot_images, *page)
    return list(files)


@dataclass(frozen=True, eq=False)
class View:
    """The result of a policy on N images."""

    name: str
    canonical: str
    """The policy spelt out; empty where that is its name."""
    originals: np.ndarray
    """uint8 (N, H, W, 3)."""
    images: np.ndarray
    """uint8 (N, H, W, 3), augmented."""
    classes: list[str]
    captions: list[str]
    draws: list[str]
    """A description of what was drawn for each image."""

    @property
    def title(self) -> str:
        """The name, and below it the policy spelt out."""
        return "\n".join(filter(None, (self.name, self.canonical)))

    def text(self, index: Tensor) -> str:
        rows = zip(index.tolist(), self.classes, self.draws, strict=True)
        lines = [f"{place:8}  {name:20}  {draw}" for place, name, draw in rows]
        return "\n".join([self.title.replace("\n", "  "), *lines])


def view(text: str, dataset: ImageSet, key: Key, index: Tensor) -> View:
    """Applies the policy `text` to the images at `index`, int64 (N,)."""
    policy = parse(text)
    height, width = dataset.images.shape[1:3]
    params = sample(policy, key, index, (height, width), len(dataset))
    images = augmented(policy, dataset, key, index)
    if params.mixing is not None:
        partners = augmented(policy, dataset, key, params.mixing.partner)
        images = mix_images(images.permute(0, 3, 1, 2), partners.permute(0, 3, 1, 2), params.mixing).permute(0, 2, 3, 1)
    classes = [class_name(dataset, place) for place in index.tolist()]
    captions = [caption(params.mixing, row, name, dataset) for row, name in enumerate(classes)]
    draws = [describe(params, row, (height, width), dataset) for row in range(len(index))]
    canonical = "" if str(policy) == text else str(policy)
    return View(text, canonical, dataset.images[index].numpy(), images.numpy(), classes, captions, draws)


def class_name(dataset: ImageSet, place: int) -> str:
    return dataset.classes[int(dataset.labels[place])]


def caption(mixing: Mixing | None, row: int, name: str, dataset: ImageSet) -> str:
    """The class, and below it the partner's class with its share where two images are mixed."""
    if mixing is None:
        return shortened(name, CAPTION)
    share, partner = int(mixing.share[row]) / 256, class_name(dataset, int(mixing.partner[row]))
    return f"{shortened(name, CAPTION)} {share:.0%}\n{shortened(partner, CAPTION)} {1 - share:.0%}"


def describe(params: Params, row: int, size: tuple[int, int], dataset: ImageSet) -> str:
    """Describes what was drawn for one sample, in the order of the operations."""
    words = [] if params.warp is None else describe_warp(params.warp[row].tolist(), size)
    for slot in params.slots:
        operation = Operation(int(slot.operation[row]))
        value = "" if operation in VALUELESS else f" {slot.value[row].item():.4g}"
        words.append(operation.name.lower().replace("_", " ") + value)
    if params.grey is not None and params.grey[row]:
        words.append("greyscale")
    if params.intensity is not None:
        words.append("intensity " + " ".join(f"{multiple:+.2f}" for multiple in params.intensity[row].tolist()))
    if params.boxes is not None:
        words += [f"erased {box}" for box in map(describe_box, params.boxes[row].tolist()) if box]
    if params.mixing is not None:
        words.append(describe_mixing(params.mixing, row, dataset))
    return ", ".join(words) or "unchanged"


def describe_warp(numbers: Sequence[int], size: tuple[int, int]) -> list[str]:
    """Describes a map, given as six fixed-point numbers: mirror, angle, shear, and shift of the centre.

    The map leads from output to input. Without its mirror it is a shear after a rotation, which is its second row. With
    quarter turns and a shear, the angle is that of the whole.
    """
    a, b, c, d, e, f = (number / ONE for number in numbers)
    height, width = size
    determinant = a * e - b * d
    # Where the input's centre appears in the output: the inverted map, where c and f include half an output pixel.
    x, y = width / 2 - c + (a + b) / 2, height / 2 - f + (d + e) / 2
    right, down = (e * x - b * y) / determinant - width / 2, (a * y - d * x) / determinant - height / 2
    if determinant < 0:
        a, b = -a, -b
    angle, tangent = math.degrees(math.atan2(d, e)), b * e + a * d
    words = ["mirrored"] if determinant < 0 else []
    words += [f"turned {angle:+.1f} degrees"] if abs(angle) >= 0.05 else []
    words += [f"sheared {math.degrees(math.atan(tangent)):+.1f} degrees"] if abs(tangent) >= 0.001 else []
    shifts = [f"{abs(right):.1f} px {'right' if right > 0 else 'left'}"] if abs(right) >= 0.05 else []
    shifts += [f"{abs(down):.1f} px {'down' if down > 0 else 'up'}"] if abs(down) >= 0.05 else []
    return words + ([f"moved {' and '.join(shifts)}"] if shifts else [])


def describe_box(box: Sequence[int]) -> str:
    """The size and the upper left corner of a box; empty for an empty box."""
    top, left, bottom, right = box
    return f"{bottom - top}x{right - left} at ({top}, {left})" if bottom > top and right > left else ""


def describe_mixing(mixing: Mixing, row: int, dataset: ImageSet) -> str:
    partner = int(mixing.partner[row])
    what = f"{int(mixing.share[row]) / 256:.0%} kept, the rest from {partner} ({class_name(dataset, partner)})"
    return what if mixing.box is None else f"{what}: {describe_box(mixing.box[row].tolist()) or 'nothing'}"


def pairs_of(view: View) -> tuple[np.ndarray, list[str], str]:
    """The arguments of `plot_images` for a page of originals, each above its result."""
    title = wrapped(view.title, 24 * min(COLUMNS, len(view.captions)))
    return np.stack((view.originals, view.images)), view.captions, title


def sheet_of(views: Sequence[View]) -> tuple[np.ndarray, list[str], str, list[str]]:
    """The arguments of `plot_images` for a row of originals above a row for each policy."""
    labels = [wrapped(view.title, 28, 4) for view in views]
    images = np.stack([views[0].originals, *(view.images for view in views)])
    return images, [shortened(name, 10) for name in views[0].classes], "", ["original", *labels]


def wrapped(text: str, width: int, lines: int | None = None) -> str:
    """Wraps to lines of at most `width` letters, after commas too; cuts what exceeds `lines`."""
    texts = [textwrap.wrap(line.replace(",", ", "), width) for line in text.split("\n")]
    return "\n".join([*itertools.chain(*texts)][:lines])
