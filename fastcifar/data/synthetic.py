"""Ten classes of drawn shapes and textures: a data set without download, for first steps, tests and timings.

The class lies in the form alone. Figure and ground have random colours, either of which may be the lighter one, so that
no weighted sum of pixels tells the classes apart, while a small convolutional network learns them in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastcifar.data.image_set import ImageSet

SIZE = 32
SPLITS = {"train": 10_000, "test": 2_000}
"""Images in each split."""
MEAN = (0.4963, 0.4966, 0.4968)
STD = (0.2946, 0.2942, 0.2961)

Field = np.ndarray
"""A value for each pixel of N images: float64 (N, 32, 32), in pixels."""


@dataclass
class Canvas:
    """Random positions of N drawings, in pixels. Distances to the outline are negative inside the figure."""

    draw: Callable[[float, float], np.ndarray]
    """Draws uniform numbers between two bounds, (N, 1, 1)."""

    def rotated(self, steepest: float, spread: float) -> tuple[Field, Field]:
        """Coordinates rotated about a random point.

        Half the angle has a tangent of at most `steepest`; the point is at most `spread` from the middle.

        The rational parametrisation of the circle needs no sine, whose last bit differs between machines.
        """
        t = self.draw(-steepest, steepest)
        cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        axis = np.arange(SIZE) - (SIZE - 1) / 2
        x, y = axis[None, None, :] - self.draw(-spread, spread), axis[None, :, None] - self.draw(-spread, spread)
        return cosine * x + sine * y, cosine * y - sine * x

    def shape(self) -> tuple[Field, Field, np.ndarray, np.ndarray]:
        """Coordinates about the shape's centre, its radius, and half the width of its lines."""
        radius = self.draw(6.0, 11.0)
        return *self.rotated(1.0, 5.0), radius, radius * self.draw(0.16, 0.24)

    def waves(self, steepest: float) -> tuple[Field, Field, np.ndarray]:
        """Distance from the nearest of evenly spaced lines, along two rotated axes, and the spacing of the lines."""
        period = self.draw(6.0, 10.0)
        u, v = (np.abs(w - period * np.floor(w / period + 0.5)) for w in self.rotated(steepest, 5.0))
        return u, v, period


def disc(canvas: Canvas) -> Field:
    u, v, radius, _ = canvas.shape()
    return np.sqrt(u * u + v * v) - radius


def ring(canvas: Canvas) -> Field:
    u, v, radius, width = canvas.shape()
    return np.abs(np.sqrt(u * u + v * v) - radius) - width


def square_outline(canvas: Canvas) -> Field:
    u, v, radius, width = canvas.shape()
    return np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.85 * radius) - width


def cross(canvas: Canvas) -> Field:
    u, v, radius, width = canvas.shape()
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - radius, np.minimum(u, v) - width)


def triangle(canvas: Canvas) -> Field:
    u, v, radius, _ = canvas.shape()
    return np.maximum(np.sqrt(0.75) * np.abs(u) + v / 2, -v) - 0.6 * radius


def horizontal_stripes(canvas: Canvas) -> Field:
    _, v, period = canvas.waves(0.1)
    return v - period / 4


def vertical_stripes(canvas: Canvas) -> Field:
    u, _, period = canvas.waves(0.1)
    return u - period / 4


def diagonal_stripes(canvas: Canvas) -> Field:
    """Draws falling or rising stripes, so that a mirrored image keeps its class."""
    u, v = canvas.rotated(0.1, 5.0)
    period = canvas.draw(6.0, 10.0)
    across = (u + np.where(canvas.draw(-1, 1) < 0, -v, v)) * np.sqrt(0.5)
    return np.abs(across - period * np.floor(across / period + 0.5)) - period / 4


def checkerboard(canvas: Canvas) -> Field:
    u, v, period = canvas.waves(1.0)
    u, v = u - period / 4, v - period / 4
    return np.minimum(np.maximum(u, v), -np.minimum(u, v))


def dots(canvas: Canvas) -> Field:
    u, v, period = canvas.waves(1.0)
    return np.sqrt(u * u + v * v) - 0.3 * period


DRAWINGS: dict[str, Callable[[Canvas], Field]] = {
    "disc": disc,
    "ring": ring,
    "square outline": square_outline,
    "cross": cross,
    "triangle": triangle,
    "horizontal stripes": horizontal_stripes,
    "vertical stripes": vertical_stripes,
    "diagonal stripes": diagonal_stripes,
    "checkerboard": checkerboard,
    "dots": dots,
}
"""The drawing function of each class; it draws all images that the canvas holds."""


def synthetic(split: str = "train") -> ImageSet:
    """The drawn data set: 10,000 images in "train", 2,000 in "test", as many of each class, in a fixed random order.

    The same bytes on every machine: the draws are the raw output of Philox, whose stream numpy guarantees, and the
    arithmetic is confined to what IEEE 754 rounds correctly.

    Returns:
        images uint8 (N, 32, 32, 3), labels int64 (N,), ten classes, and the train split's mean and std.
    """
    seed, count = list(SPLITS).index(split), SPLITS[split]
    order = np.argsort(np.random.Philox(key=[seed, len(DRAWINGS)]).random_raw(count), kind="stable")
    labels = np.empty(count, dtype=np.int64)
    labels[order] = np.arange(count) % len(DRAWINGS)
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    for label, drawing in enumerate(DRAWINGS.values()):
        images[labels == label] = draw_class(drawing, seed, label, count // len(DRAWINGS))
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), tuple(DRAWINGS), MEAN, STD)


def draw_class(drawing: Callable[[Canvas], Field], seed: int, label: int, count: int) -> np.ndarray:
    """Draws all images of a class, uint8 (count, 32, 32, 3)."""
    philox = np.random.Philox(key=[seed, label])

    def draw(low: float, high: float) -> np.ndarray:
        return low + (high - low) * ((philox.random_raw(count) >> np.uint64(11)) * 2.0**-53).reshape(-1, 1, 1)

    cover = np.clip(0.5 - drawing(Canvas(draw)), 0.0, 1.0)
    ground = np.concatenate([np.floor(draw(0, 256)) for _ in range(3)], axis=2)[:, None]
    # On the circle of 256 levels the figure is opposite the ground, within 90, so every channel shows it.
    figure = (ground + np.concatenate([np.floor(draw(38, 219)) for _ in range(3)], axis=2)[:, None]) % 256
    picture = np.rint(ground + (figure - ground) * cover[..., None]).astype(np.int16)
    grain = philox.random_raw(picture.size // 4).astype("<u8").view(np.int8).astype(np.int16)
    picture += ((grain[::2] + grain[1::2]) // 3).reshape(picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)
