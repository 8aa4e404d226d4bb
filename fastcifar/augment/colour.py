"""The operations of automatic augmentation that move no pixel, each equal to PIL's to the last bit.

Images are contiguous uint8 (N, H, W, 3) on any device; factors, bits and thresholds are float64 (N, 1, 1, 1) there.
Nothing makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastcifar.augment.automatic import Operation
from fastcifar.kernels.augment import luma
from fastcifar.kernels.transfer import upload

LEVELS = 256

CHANGES: dict[Operation, Callable[[Tensor, Tensor], Tensor]] = {
    Operation.IDENTITY: lambda images, _: images.clone(),
    Operation.AUTO_CONTRAST: lambda images, _: auto_contrast(images),
    Operation.INVERT: lambda images, _: ~images,
    Operation.EQUALIZE: lambda images, _: equalize(images),
    Operation.SOLARIZE: lambda images, threshold: solarize(images, threshold),
    Operation.POSTERIZE: lambda images, bits: posterize(images, bits),
    Operation.CONTRAST: lambda images, factor: blend(mean_luma(images), images, factor),
    Operation.COLOR: lambda images, factor: saturate(images, factor),
    Operation.BRIGHTNESS: lambda images, factor: blend(torch.zeros_like(factor), images, factor),
    Operation.SHARPNESS: lambda images, factor: sharpen(images, factor),
}
"""The function of each operation except the geometric ones: images and values, float64 (N, 1, 1, 1), to images."""


def apply_operation(images: Tensor, operation: Operation, value: Tensor) -> Tensor:
    """Applies one operation to a group of images, each with its own value.

    Args:
        images: uint8 (N, H, W, 3), contiguous.
        operation: any but the geometric ones.
        value: float64 (N,) in the operation's unit, on the CPU or on the images' device.

    Returns:
        A new uint8 (N, H, W, 3).
    """
    return CHANGES[operation](images, upload(value, images.device)[:, None, None, None])


def mean_luma(images: Tensor) -> Tensor:
    """The mean grey level, for contrast (`ImageEnhance.Contrast`), halves rounded up: int64 (N, 1, 1, 1)."""
    pixels = images.shape[1] * images.shape[2]
    return ((2 * luma(images).sum((1, 2)) + pixels) // (2 * pixels))[:, None, None, None]


def blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Interpolates from `degenerate` (whole numbers) at factor 0 to `images` at 1, and extrapolates beyond.

    `degenerate` has the shape of `images` or one value an image.

    As in PIL's Blend.c, the product and the sum are each rounded to float32, so neither a lerp nor a fused multiply-add
    will do.
    """
    degenerate = degenerate.float()
    return images.float().sub_(degenerate).mul_(factor.float()).add_(degenerate).clamp_(0, 255).to(torch.uint8)


def saturate(images: Tensor, factor: Tensor) -> Tensor:
    """Changes saturation (`ImageEnhance.Color`), one channel at a time to avoid three copies of the grey image."""
    grey = luma(images)[..., None].float()
    return torch.cat([blend(grey, channel, factor) for channel in images.split(1, dim=3)], dim=3)


def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Changes sharpness relative to the smoothed image (`ImageEnhance.Sharpness`); the border stays."""
    sharpened = images.clone()
    sharpened[:, 1:-1, 1:-1] = blend(smooth(images), images[:, 1:-1, 1:-1], factor)
    return sharpened


def smooth(images: Tensor) -> Tensor:
    """The weighted mean of each 3x3 neighbourhood (`ImageFilter.SMOOTH`): float32 (N, H - 2, W - 2, 3).

    The centre counts 5 times, so weights sum to 13, and the mean is rounded.

    As 13 is odd, no mean is near a half, and any rounding gives what PIL's does.
    """
    levels = images.short()
    rows = levels[:, :-2] + levels[:, 1:-1] + levels[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * levels[:, 1:-1, 1:-1]
    return total.float().div_(13).round_()


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest bits (`ImageOps.posterize`); 0 bits leave black."""
    return images & (LEVELS - (LEVELS >> bits.int())).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts levels from the threshold up (`ImageOps.solarize`); the threshold may be fractional."""
    # A threshold above 255 does not fit a byte; it inverts nothing, so no bits are flipped.
    flip = (255 * (threshold <= 255)).to(torch.uint8)
    reached = images >= threshold.ceil().clamp(0, 255).to(torch.uint8)
    return images ^ (reached.view(torch.uint8) * flip)


def auto_contrast(images: Tensor) -> Tensor:
    """Stretches each channel to the full range (`ImageOps.autocontrast`); constant channels stay.

    Computed in float64 as in Python, since its rounding matters where the exact result is a whole number: the lightest
    level may become 254.
    """
    low, high = extrema(images)
    # A tensor over a tensor, since PyTorch computes number / tensor by the reciprocal, which rounds twice.
    scale = torch.where(high > low, torch.full_like(low, 255) / (high - low), 1.0)
    offset = torch.where(high > low, -low * scale, 0.0)
    levels = torch.arange(LEVELS, dtype=torch.float64, device=images.device)
    tables = (levels * scale).add_(offset).clamp_(0, 255).to(torch.uint8)
    return look_up(tables, table_index(images)).view_as(images)


def extrema(images: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest level of each channel: float64 (N, 3, 1) each.

    Columns are reduced first, over rows of bytes: with channels innermost the whole reduction is slow on a CPU.
    """
    low, high = images.amin(1).amin(1), images.amax(1).amax(1)
    return low[:, :, None].double(), high[:, :, None].double()


def equalize(images: Tensor) -> Tensor:
    """Equalises the histogram of each channel (`ImageOps.equalize`).

    A channel stays where too few pixels are darker than its lightest level.
    """
    count, device = len(images), images.device
    index = table_index(images)
    ones = torch.ones(1, dtype=torch.int32, device=device).expand(index.shape)
    histogram = (
        torch.zeros(count * 3 * LEVELS, dtype=torch.int32, device=device)
        .index_add_(0, index, ones)
        .view(count, 3, LEVELS)
    )
    # Integer counts, since a GPU has no deterministic cumsum of floats.
    darker = histogram.cumsum(2, dtype=torch.int32).sub_(histogram)
    # The count at the highest level that occurs; in place, as new memory costs a CPU more than the arithmetic.
    darker_than_lightest = histogram.clamp_(max=1).mul_(darker).amax(2, keepdim=True)
    step = darker_than_lightest // 255
    tables = darker.add_(step // 2).float().div_(step.clamp(min=1)).clamp_(max=255).to(torch.uint8)
    unchanged = torch.arange(LEVELS, dtype=torch.uint8, device=device)
    return look_up(torch.where(step > 0, tables, unchanged), index).view_as(images)


def table_index(images: Tensor) -> Tensor:
    """The index of each byte's level in tables of shape (N, 3, 256): int32 (N * H * W * 3,)."""
    levels = images.flatten(1).int()
    count, size = levels.shape
    levels += torch.arange(size, dtype=torch.int32, device=images.device) % 3 * LEVELS
    levels += torch.arange(0, count * 3 * LEVELS, 3 * LEVELS, dtype=torch.int32, device=images.device)[:, None]
    return levels.flatten()


def look_up(tables: Tensor, index: Tensor) -> Tensor:
    """Looks up each byte: uint8 tables (N, 3, 256) and a `table_index` -> uint8 (N * H * W * 3,)."""
    return tables.flatten().index_select(0, index)
