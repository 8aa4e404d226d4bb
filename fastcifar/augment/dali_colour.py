"""The operations of `colour` as nodes of a DALI graph, each equal to PIL to the last bit.

DALI runs each node as a kernel of its own, so a product and a sum are rounded one after the other, as PIL rounds them.
Many images are one sample of DALI's, since its host work is by the sample: uint8 (G, H, W, 3), without a layout that
would have it take them apart, and a value for each, float64 (G, 1, 1, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcifar.augment.automatic import Operation

FRAME = (1, 2)
"""The dimensions of height and width."""
Node = Any
"""`nvidia.dali.data_node.DataNode`: the output of an operator for every sample of a batch."""


@dataclass(frozen=True)
class Colours:
    """The operations over images of one size (height and width), on `device`, which is "cpu" or "gpu"."""

    dali: Any
    size: tuple[int, int]
    device: str

    def auto_contrast(self, images: Node) -> Node:
        """Computes in float64, whose rounding matters where the exact result is a whole number.

        A constant channel gets the factor 1.
        """
        reductions = self.dali.fn.reductions
        low, high = (
            self.cast(extreme(images, axes=FRAME, keep_dims=True), "FLOAT64")
            for extreme in (reductions.min, reductions.max)
        )
        constant = high == low
        scale = (255.0 - 254.0 * constant) / (high - low + constant)
        return self.floor(images * scale - low * scale * (1.0 - constant))

    def invert(self, images: Node) -> Node:
        return images ^ self.byte(255)

    def solarize(self, images: Node, threshold: Node) -> Node:
        return images ^ ((images >= threshold) * self.byte(255))

    def posterize(self, images: Node, bits: Node) -> Node:
        return images & self.cast(256.0 - self.dali.math.pow(2.0, 8.0 - bits), "UINT8")

    def contrast(self, images: Node, factor: Node) -> Node:
        total = self.dali.fn.reductions.sum(self.cast(self.luma(images), "INT32"), axes=FRAME, keep_dims=True)
        pixels = self.size[0] * self.size[1]
        return self.blend(self.cast((2 * total + pixels) // (2 * pixels), "FLOAT"), images, factor)

    def saturate(self, images: Node, factor: Node) -> Node:
        return self.blend(self.luma(images), images, factor)

    def brighten(self, images: Node, factor: Node) -> Node:
        return self.floor(images * self.cast(factor, "FLOAT"))

    def sharpen(self, images: Node, factor: Node) -> Node:
        """Smooths all but the border, then blends with the result; as the divisor 13 is odd, no mean is near a half."""
        weights = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
        inner = np.zeros((*self.size, 1), dtype=np.uint8)
        inner[1:-1, 1:-1] = 255
        frames = self.dali.fn.reshape(images, layout="FHWC")
        smooth = self.dali.fn.filter(frames, self.dali.types.Constant(weights, device=self.device))
        smoothed = self.select(images, smooth, self.dali.types.Constant(inner, device=self.device))
        return self.blend(self.cast(smoothed, "FLOAT"), images, factor)

    def greyscale(self, images: Node, chosen: Node) -> Node:
        """The luma of images where `chosen` is 255; images with 0 stay."""
        return self.select(images, self.cast(self.luma(images), "UINT8"), chosen)

    def select(self, images: Node, others: Node, mask: Node) -> Node:
        """Takes the bits of `others` where those of `mask` are set: uint8."""
        return images ^ ((images ^ others) & mask)

    def luma(self, images: Node) -> Node:
        """uint8 (..., 3) -> float32 (..., 1), whole numbers.

        8 bits and 16 of fraction are exact in float32, in any order of the sums.
        """
        weights = [weight / 65536 for weight in (19595, 38470, 7471)]
        return self.dali.math.floor(self.dali.fn.coord_transform(images, M=weights, T=[0.5]))

    def blend(self, degenerate: Node, images: Node, factor: Node) -> Node:
        """Interpolates from `degenerate`, whole numbers in float32, at 0 to `images` at 1, and extrapolates beyond."""
        return self.floor((images - degenerate) * self.cast(factor, "FLOAT") + degenerate)

    def floor(self, levels: Node) -> Node:
        """Converts levels to bytes, rounded down and clipped."""
        return self.cast(self.dali.math.floor(levels), "UINT8")

    def cast(self, node: Node, dtype: str) -> Node:
        return self.dali.fn.cast(node, dtype=getattr(self.dali.types, dtype))

    def byte(self, value: int) -> Node:
        return self.dali.types.Constant(value, dtype=self.dali.types.UINT8)


WITHOUT_VALUE: dict[Operation, Callable[[Colours, Node], Node]] = {
    Operation.AUTO_CONTRAST: Colours.auto_contrast,
    Operation.INVERT: Colours.invert,
}
WITH_VALUE: dict[Operation, Callable[[Colours, Node, Node], Node]] = {
    Operation.SOLARIZE: Colours.solarize,
    Operation.POSTERIZE: Colours.posterize,
    Operation.CONTRAST: Colours.contrast,
    Operation.COLOR: Colours.saturate,
    Operation.BRIGHTNESS: Colours.brighten,
    Operation.SHARPNESS: Colours.sharpen,
}
