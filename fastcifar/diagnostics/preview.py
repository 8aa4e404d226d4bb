"""Pictures of what augmentation policies do, drawn by the code that trains."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastcifar.analysis.picture import save
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 64
"""A power of two, so that a page of whole pixels has exact inches."""
MARGIN, GAP, LINE = 16, 2, 16
"""Pixels around a page, between images, and from one line of text to the next."""
PAIR_SIDE, SHEET_SIDE = 128, 64
"""Pixels a side that an image takes at most, unless it has more of its own: on a policy's own page, and on the sheet
of all.
"""
PAIRS_A_ROW = 6
NAME_WIDTH = 176
"""Pixels left of a sheet's rows."""
NARROWEST = 320
"""Pixels that a page of pairs has for its title."""
LETTER = 7
"""Pixels across a letter, about."""
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
    """Draws `count` images, evenly spread over `dataset`, as each policy has them in one epoch of training.

    One policy makes a page of pairs, the original above what became of it, each with its class. Several make a sheet
    with a row for each.

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
        print("\n\n".join(one.text(index) for one in views))
    pages = {"all.png": sheet(views)} if len(views) > 1 else {}
    if not is_file or not pages:
        pages |= {f"{re.sub(r'[^A-Za-z0-9.]+', '_', one.name)}.png": pairs(one) for one in views}
    files = {path if is_file else path / name: page for name, page in pages.items()}
    for file, page in files.items():
        save(file, page.figure)
    return list(files)


@dataclass(frozen=True, eq=False)
class View:
    """What a policy makes of some images, N of them."""

    name: str
    canonical: str
    """The policy spelt out; empty where that is its name."""
    originals: np.ndarray
    """uint8 (N, H, W, 3)."""
    images: np.ndarray
    """uint8 (N, H, W, 3), augmented."""
    classes: list[str]
    captions: list[str]
    """The class, and below it the partner's with its share, where two images are mixed."""
    draws: list[str]
    """What was drawn, in words."""

    def text(self, index: Tensor) -> str:
        """A line for each image: its place in the data set, its class, and what was drawn."""
        rows = zip(index.tolist(), self.classes, self.draws, strict=True)
        lines = [f"{place:8}  {name:20}  {draw}" for place, name, draw in rows]
        return "\n".join(["  ".join(filter(None, (self.name, self.canonical))), *lines])


def view(text: str, dataset: ImageSet, key: Key, index: Tensor) -> View:
    """The images at `index`, int64 (N,), under the policy that `text` describes."""
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
    if mixing is None:
        return name
    share = int(mixing.share[row]) / 256
    return f"{name} {share:.0%}\n{class_name(dataset, int(mixing.partner[row]))} {1 - share:.0%}"


def describe(params: Params, row: int, size: tuple[int, int], dataset: ImageSet) -> str:
    """What was drawn for one sample, in words and in the order in which it is done."""
    words = [] if params.warp is None else describe_warp(params.warp[row].tolist(), size)
    for slot in params.slots:
        operation = Operation(int(slot.operation[row]))
        value = "" if operation in VALUELESS else f" {slot.value[row].item():.4g}"
        words.append(operation.name.lower().replace("_", " ") + value)
    if params.grey is not None and params.grey[row]:
        words.append("greyscale")
    if params.boxes is not None:
        words += [f"erased {box}" for box in map(describe_box, params.boxes[row].tolist()) if box]
    if params.mixing is not None:
        words.append(describe_mixing(params.mixing, row, dataset))
    return ", ".join(words) or "unchanged"


def describe_warp(numbers: Sequence[int], size: tuple[int, int]) -> list[str]:
    """Mirror, then angle and shear, then where the centre went, from a map's six numbers in fixed point.

    The map leads from output to input. Without its mirror it is a shear after a rotation, the latter being its second
    row. Where quarter turns and a shear meet, that is the angle of the whole.
    """
    a, b, c, d, e, f = (number / ONE for number in numbers)
    height, width = size
    determinant = a * e - b * d
    # Where the output must be so that the input's centre is read: the map inverted, c and f including half a pixel of
    # the output.
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
    """Height and width, and the upper left corner; nothing for an empty box."""
    top, left, bottom, right = box
    return f"{bottom - top}x{right - left} at ({top}, {left})" if bottom > top and right > left else ""


def describe_mixing(mixing: Mixing, row: int, dataset: ImageSet) -> str:
    partner = int(mixing.partner[row])
    what = f"{int(mixing.share[row]) / 256:.0%} kept, the rest from {partner} ({class_name(dataset, partner)})"
    return what if mixing.box is None else f"{what}: {describe_box(mixing.box[row].tolist()) or 'nothing'}"


@dataclass(eq=False)
class Page:
    """White paper, on which places are given in pixels from the upper left corner."""

    width: int
    height: int
    texts: list[tuple[int, int, str, dict[str, object]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pixels = np.full((self.height, self.width, 3), 255, np.uint8)

    def place(self, image: np.ndarray, scale: int, x: int, y: int) -> None:
        """Draws uint8 (H, W, 3), each pixel as `scale` by `scale` of the page's."""
        large = image.repeat(scale, axis=0).repeat(scale, axis=1)
        self.pixels[y : y + large.shape[0], x : x + large.shape[1]] = large

    def write(self, text: str, x: int, y: int, pixels: int = 11, **style: object) -> None:
        """Sets text, whose upper edge is at `y`, in letters of so many pixels."""
        self.texts.append(
            (x, y, text, {"fontsize": pixels * 72 / DOTS_PER_INCH, "va": "top", "parse_math": False, **style})
        )

    def figure(self) -> Figure:
        """The page as it is printed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(self.width / DOTS_PER_INCH, self.height / DOTS_PER_INCH), dpi=DOTS_PER_INCH)
        figure.figimage(self.pixels, origin="upper")
        for x, y, text, style in self.texts:
            figure.text(x / self.width, 1 - y / self.height, text, **style)
        return figure


def wrapped(text: str, letters: int, lines: int | None = None) -> str:
    """A policy's text in lines of at most so many letters, broken after commas; what exceeds so many lines is left
    out.
    """
    spaced = textwrap.wrap(text.replace(",", ", "), letters, max_lines=lines, placeholder=" ...")
    return "\n".join(line.replace(", ", ",") for line in spaced)


def cut(text: str, letters: int) -> str:
    """Each line of a caption, shortened to so many letters."""
    return "\n".join(line if len(line) <= letters else f"{line[: max(letters - 1, 0)]}…" for line in text.split("\n"))


def pairs(view: View) -> Page:
    """A page of originals, each above what became of it."""
    count, height, width, _ = view.images.shape
    scale = max(1, PAIR_SIDE // max(height, width))
    columns = min(PAIRS_A_ROW, count)
    page_width = max(MARGIN + columns * (width * scale + MARGIN), NARROWEST)
    name, canonical = wrapped(view.name, page_width // (2 * LETTER)), wrapped(view.canonical, page_width // LETTER)
    below_name = MARGIN + 8 + int(1.25 * LINE * name.count("\n")) + LINE
    top = below_name + LINE * (canonical.count("\n") + 1 if canonical else 0) + LINE // 2
    head = LINE * max(text.count("\n") + 1 for text in view.captions)
    step = head + 2 * height * scale + GAP + MARGIN
    page = Page(page_width, top + math.ceil(count / columns) * step)
    page.write(name, MARGIN, MARGIN, 16, weight="bold")
    page.write(canonical, MARGIN, below_name)
    for number, text in enumerate(view.captions):
        x, y = MARGIN + number % columns * (width * scale + MARGIN), top + number // columns * step
        page.write(cut(text, width * scale // LETTER), x + width * scale // 2, y, ha="center")
        page.place(view.originals[number], scale, x, y + head)
        page.place(view.images[number], scale, x, y + head + height * scale + GAP)
    return page


def sheet(views: Sequence[View]) -> Page:
    """The originals in a row, and below them a row for each policy."""
    count, height, width, _ = views[0].images.shape
    scale = max(1, SHEET_SIDE // max(height, width))
    x_step, y_step = width * scale + GAP, max(height * scale + GAP, 4 * LINE)
    top, left = MARGIN + LINE, MARGIN + NAME_WIDTH
    page = Page(left + count * x_step + MARGIN, top + (len(views) + 1) * y_step + MARGIN)
    rows = [("original", "", views[0].originals), *((view.name, view.canonical, view.images) for view in views)]
    for number, (name, canonical, images) in enumerate(rows):
        y = top + number * y_step
        page.write(wrapped(name, 21, 1 if canonical else 3), MARGIN, y, weight="bold")
        page.write(wrapped(canonical, 28, 3), MARGIN, y + LINE, 9)
        for column, image in enumerate(images):
            page.place(image, scale, left + column * x_step, y)
    for column, name in enumerate(views[0].classes):
        page.write(cut(name, width * scale // 6), left + column * x_step + width * scale // 2, MARGIN, 9, ha="center")
    return page
