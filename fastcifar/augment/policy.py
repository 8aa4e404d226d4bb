"""Augmentation policies as values, written `crop:4,flip:0.5` and checked when built; free of torch.

Operations always come in this order, however they are written: one warp (crop, mirror, rotation, translation, shear),
the automatic policy, greyscale, intensities, erased squares, normalisation, mixing of two images.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from fastcifar.errors import ConfigError, unknown

FILLS = ("black", "mean", "reflect", "clamp")
Reader = Callable[[str], dict[str, object]]
"""Parses the value of a part into the fields that it sets; raises ValueError or KeyError where it is malformed."""


@dataclass(frozen=True)
class Erase:
    """Painted squares: each image gets `count` of `size` pixels a side with `probability`."""

    count: int
    size: int
    probability: float = 1.0
    inside: bool = False
    """If set, whole squares in black, as in Albumentations' CoarseDropout; else uniform centres, squares clipped at the
    border and filled with the data set's mean, as in Cutout (DeVries and Taylor 2017, arXiv:1708.04552)."""


@dataclass(frozen=True)
class Mix:
    """Mixes each image and label with another; `kind` is mixup or cutmix, and shares are from Beta(alpha, alpha)."""

    kind: str
    alpha: float


@dataclass(frozen=True)
class Policy:
    """A composition of augmentations; `str(policy)` is its canonical text, which `parse` reads back.

    Raises:
        ConfigError: a value out of range.
    """

    crop: int = 0
    """Pixels of padding on each side before a window of the image's own size is cut out."""
    flip: float = 0.0
    """Probability of the mirror image."""
    alternating: bool = False
    """Mirror a random half in the first epoch, the other half in the next, and so on (Jordan 2024, arXiv:2404.00498).
    """
    rotate: float = 0.0
    """Largest angle, in degrees, either way."""
    turns: bool = False
    """Rotate by a random multiple of 90 degrees."""
    translate: float = 0.0
    """Largest shift along each axis, as a share of the side, in whole pixels."""
    shear: float = 0.0
    """Largest angle of a horizontal shear, in degrees, either way."""
    fill: str = "black"
    """Fill beyond the border: black, mean, reflect or clamp."""
    interpolation: str = "nearest"
    """nearest or bilinear."""
    automatic: tuple[str, tuple[int, ...]] | None = None
    """The name and the numbers of an automatic policy."""
    greyscale: float = 0.0
    """Probability of conversion to grey."""
    intensity: float = 0.0
    """Standard deviation of the multiples of the data set's colour axes that are added to an image."""
    erase: Erase | None = None
    mix: Mix | None = None

    def __post_init__(self) -> None:
        for name, low, high in RANGES:
            if not low <= getattr(self, name) <= high:
                value = f"{getattr(self, name):g}"
                raise ConfigError(f"augmentation {name} is {value}; give a value from {low:g} to {high:g}.")
        erase = self.erase or Erase(1, 1)
        if not (1 <= erase.count <= 64 and 1 <= erase.size <= 1024 and 0 <= erase.probability <= 1):
            raise ConfigError("augmentation cutout takes 1 to 64 squares of at least one pixel, such as cutout:4x4.")
        if self.mix and not 0.05 <= self.mix.alpha <= 100:
            raise ConfigError(f"augmentation {self.mix.kind} is {self.mix.alpha:g}; give a value from 0.05 to 100.")
        if self.automatic and self.automatic[0] == "randaugment":
            rounds, magnitude = self.automatic[1]
            if not (1 <= rounds <= 8 and 0 <= magnitude <= 30):
                given = f"augmentation randaugment is {rounds},{magnitude}"
                raise ConfigError(f"{given}; give 1 to 8 operations and a magnitude of 0 to 30.")

    @property
    def warps(self) -> bool:
        """Whether the policy moves pixels."""
        return any((self.crop, self.flip, self.alternating, self.rotate, self.turns, self.translate, self.shear))

    def __str__(self) -> str:
        parts = [f"{name}:{getattr(self, name):g}" for name, *_ in RANGES if getattr(self, name)]
        parts += ["flip:alternating"] * self.alternating + ["turns"] * self.turns
        parts += [f"fill:{self.fill}"] * (self.fill != "black") + ["bilinear"] * (self.interpolation == "bilinear")
        if self.automatic:
            name, numbers = self.automatic
            parts.append(":".join([name, ",".join(map(str, numbers))]) if numbers else name)
        if self.erase:
            name = "coarse" if self.erase.inside else "cutout"
            shape = f"{name}:{self.erase.count}x{self.erase.size}"
            parts.append(shape if self.erase.probability == 1 else f"{shape}:{self.erase.probability:g}")
        parts += [f"{self.mix.kind}:{self.mix.alpha:g}"] if self.mix else []
        return ",".join(parts) or "none"


RANGES = (
    ("crop", 0, 64),
    ("flip", 0, 1),
    ("rotate", 0, 180),
    ("translate", 0, 1),
    ("shear", 0, 80),
    ("greyscale", 0, 1),
    ("intensity", 0, 10),
)
"""The plain numbers of a `Policy` with their lowest and highest values."""

POLICIES: dict[str, str] = {
    "none": "",
    "standard": "crop:4,flip:0.5",
    "transform1": "crop:4,flip:0.5,rotate:15,translate:0.1",
    "transform2": "crop:4,flip:0.5,rotate:30,translate:0.2,shear:10",
    "transform3": "crop:4,flip:0.5,greyscale:0.1",
    "transform1_reflect": "transform1,fill:reflect,bilinear",
    "transform2_reflect": "transform2,fill:reflect,bilinear",
    "rotate5": "rotate:5",
    "cutout_4x4": "cutout:4x4",
    "cutout_1x16": "cutout:1x16",
    "coarse_dropout": "coarse:8x8:0.5",
    "airbench": "crop:2,flip:alternating,fill:reflect",
}
"""Named policies: report 1's transforms (with ranges of ours, as it gives none) and their corrected forms; report 2's
cutouts; report 5's dropout, which is Albumentations' default."""


def parse(text: str, policy: Policy | None = None) -> Policy:
    """Parses names and settings joined by commas; later ones override earlier ones and those of `policy`.

    Raises:
        ConfigError: a part that is not known, or a value that it cannot have; the sentence names the valid form.
    """
    policy = policy or Policy()
    for part in split(text):
        name, _, value = part.partition(":")
        if name not in POLICIES and name not in PARTS:
            raise ConfigError(unknown("augmentation", name, (*POLICIES, *PARTS)))
        if name in POLICIES:
            if value:
                example = f"override one of its settings, as in {name},rotate:5"
                raise ConfigError(f"augmentation {name} takes no value; {example}.")
            policy = parse(POLICIES[name], policy)
        else:
            form, read = PARTS[name]
            try:
                policy = replace(policy, **read(value))
            except (ValueError, KeyError):
                raise ConfigError(f"augmentation {part!r} cannot be read; write it as {form}.") from None
    return policy


def split(text: str) -> list[str]:
    """Splits at commas; a number alone belongs to the part before it, as in `randaugment:2,9`."""
    return [part.strip() for part in re.split(r",(?!\s*[\d.]+\s*(?:,|$))", text) if part.strip()]


def number(name: str, default: float | None = None) -> Reader:
    """Reads a plain number into the field `name`, which is required without a default."""
    kind = int if name == "crop" else float
    return lambda value: {name: kind(value) if value or default is None else default}


def read_flip(value: str) -> dict[str, object]:
    alternating = value == "alternating"
    return {"alternating": alternating, "flip": 0.0 if alternating else float(value or 0.5)}


def word(field: str, settings: dict[str, object]) -> Reader:
    """Reads one of the words in `settings` into `field`."""
    return lambda value: {field: settings[value]}


def read_automatic(name: str, *defaults: int) -> Reader:
    """Reads an automatic policy with as many whole numbers as `defaults`."""

    def read(value: str) -> dict[str, object]:
        numbers = tuple(int(part) for part in value.split(",")) if value else defaults
        if len(numbers) != len(defaults):
            raise ValueError("another count of numbers")
        return {"automatic": (name, numbers)}

    return read


def read_squares(inside: bool, default: str) -> Reader:
    """Reads `KxS` or `KxS:probability`."""

    def read(value: str) -> dict[str, object]:
        shape, _, probability = (value or default).partition(":")
        count, size = (int(part) for part in shape.split("x"))
        return {"erase": Erase(count, size, float(probability or 1), inside)}

    return read


def read_mix(kind: str) -> Reader:
    return lambda value: {"mix": Mix(kind, float(value or 1))}


PARTS: dict[str, tuple[str, Reader]] = {
    "crop": ("crop or crop:4 (pixels)", number("crop", 4)),
    "flip": ("flip, flip:0.5 (probability) or flip:alternating", read_flip),
    "rotate": ("rotate:15 (degrees)", number("rotate")),
    "turns": ("turns", word("turns", {"": True})),
    "translate": ("translate:0.1 (share of the side)", number("translate")),
    "shear": ("shear:10 (degrees)", number("shear")),
    "fill": (f"fill:{'|'.join(FILLS)}", word("fill", {fill: fill for fill in FILLS})),
    "nearest": ("nearest", word("interpolation", {"": "nearest"})),
    "bilinear": ("bilinear", word("interpolation", {"": "bilinear"})),
    "autoaugment": ("autoaugment", read_automatic("autoaugment")),
    "autoaugment_tv": ("autoaugment_tv", read_automatic("autoaugment_tv")),
    "randaugment": ("randaugment:2,9 (operations, magnitude of 30)", read_automatic("randaugment", 2, 9)),
    "trivialaugment": ("trivialaugment", read_automatic("trivialaugment")),
    "greyscale": ("greyscale:0.1 (probability)", number("greyscale")),
    "intensity": ("intensity or intensity:0.1 (deviation)", number("intensity", 0.1)),
    "cutout": (
        "cutout:1x16 (squares x pixels a side), or cutout:1x16:0.5 (with a probability)",
        read_squares(False, "1x16"),
    ),
    "coarse": ("coarse:8x8:0.5 (squares x pixels a side, probability)", read_squares(True, "8x8:0.5")),
    "mixup": ("mixup or mixup:1 (alpha)", read_mix("mixup")),
    "cutmix": ("cutmix or cutmix:1 (alpha)", read_mix("cutmix")),
}
"""The parts of a policy by name: how each is written, and its reader."""
