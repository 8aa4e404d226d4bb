"""Images resampled along maps of their own, in plain torch: the reference of the warp in `augment`.

Source: PIL (Geometry.c). All is computed in integers, so that kernel and reference agree to the last bit; the nearest
pixel is that of PIL, the bilinear value within a grey level of PIL's, which is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import is_traced
from .transfer import upload

ONE = 1 << 16
"""One pixel, in the fixed point of maps."""

BLACK = (0, 0, 0)

# A weight of 11 bits is as fine as two of them, multiplied by a byte, allow in int32.
WEIGHT_BITS = 11

# Images of 32 by 32: bilinear resampling takes 35 us an image in chunks of 64, and 60 or more in chunks of 512 (one
# core of a Xeon with 2 MB of second-level cache).
CPU_CHUNK = 64


def warp_reference(
    images: Tensor, warp: Tensor, fill: str = "constant", colour: Sequence[int] = BLACK, bilinear: bool = False
) -> Tensor:
    """Resamples each image along a map of its own: uint8 (N, H, W, 3) -> the same shape.

    Pixels are read as PIL's `Image.transform` with AFFINE reads them. A warp on the CPU is looked at, whatever the
    images' device: shifted and mirrored images then cost little more than a copy. Coordinates must stay within 32768
    pixels, as PIL's own fixed point demands.

    Args:
        warp: int32 (N, 6), a b c d e f in fixed point: the output pixel in column i and row j is read at
            (a i + b j + c, d i + e j + f), in which the half pixel to its centre is included. On the CPU or with the
            images.
        fill: what lies beyond the border: constant, one colour; reflect, the picture mirrored (edge pixel repeated); or
            clamp, the nearest edge pixel.
        colour: the three bytes of the constant fill.
        bilinear: interpolates between pixel centres instead of taking the nearest pixel.
    """
    if warp.device.type != "cpu" or is_traced(warp):  # its values cannot be looked at without waiting, or at all
        return resample(images, warp, fill, colour, bilinear)
    whole = whole_pixels(warp, bilinear) & (fill == "constant")
    rest = (~whole).nonzero()[:, 0]
    if len(rest) == len(warp):
        return resample_in_chunks(images, warp, fill, colour, bilinear)
    straight = torch.where(whole[:, None], warp, warp.new_tensor([ONE, 0, 0, 0, ONE, 0]))
    warped = shift_and_mirror(images, straight, colour)
    if not len(rest):
        return warped
    place = upload(rest, images.device)
    return warped.index_copy_(0, place, resample_in_chunks(images[place], warp[rest], fill, colour, bilinear))


def whole_pixels(warp: Tensor, bilinear: bool) -> Tensor:
    """Tells which maps only shift by whole pixels and mirror left to right: int32 (N, 6) -> bool (N,).

    When pixels are not interpolated, every shift counts as whole.
    """
    a, b, c, d, e, f = warp.unbind(1)
    straight = (a.abs() == ONE) & (b == 0) & (d == 0) & (e == ONE)
    return straight & (c % ONE == ONE // 2) & (f % ONE == ONE // 2) if bilinear else straight


def shift_and_mirror(images: Tensor, warp: Tensor, colour: Sequence[int] = BLACK) -> Tensor:
    """Does the work of `warp_reference` for maps that `whole_pixels` found, over a constant fill.

    The warp is on the CPU. A shifted row is one run of bytes in the images with a margin, so this is a selection of
    rows, at the speed of a copy.
    """
    count, height, width, channels = images.shape
    device = images.device
    mirrored = warp[:, 0] < 0
    left = ((warp[:, 2] >> 16) - mirrored * (width - 1)).clamp(-width, width)
    top = (warp[:, 5] >> 16).clamp(-height, height)
    margin = max(int(left.abs().max()), int(top.abs().max())) if count else 0
    if margin:
        wide = framed(images, margin, colour)
        across = width + 2 * margin
        first = torch.arange(count) * (height + 2 * margin) + top + margin
        start = upload((first * across + left + margin) * channels, device)
        starts = start[:, None] + torch.arange(height, device=device) * (across * channels)
        runs = wide.as_strided((wide.numel() - width * channels + 1, width * channels), (1, 1))
        images = runs.index_select(0, starts.flatten()).view(count, height, width, channels)
    else:
        images = images.clone()
    chosen = upload(mirrored.nonzero()[:, 0], device)
    return images.index_copy_(0, chosen, images.index_select(0, chosen).flip(2)) if len(chosen) else images


def framed(images: Tensor, margin: int, colour: Sequence[int]) -> Tensor:
    """Frames each image in `colour`: uint8 (N, H, W, 3) -> (N, H + 2 margin, W + 2 margin, 3)."""
    if len(set(colour)) == 1:
        return F.pad(images, (0, 0, *[margin] * 4), value=colour[0])
    count, height, width, channels = images.shape
    line = repeated(colour, width + 2 * margin, images).view(-1, channels)
    wide = line.expand(count, height + 2 * margin, -1, -1).contiguous()
    wide[:, margin:-margin, margin:-margin] = images
    return wide


def repeated(colour: Sequence[int], width: int, images: Tensor) -> Tensor:
    """Returns a row of pixels of one colour, uint8 (3 width,); its length lets the CPU's loops run at full speed."""
    return upload(torch.tensor(colour, dtype=torch.uint8).repeat(width), images.device)


def resample(images: Tensor, warp: Tensor, fill: str, colour: Sequence[int], bilinear: bool) -> Tensor:
    """Does the work of `warp_reference` for any maps.

    A pixel is gathered as one int32, and a constant fill as a border of one pixel.
    """
    count, height, width, _ = images.shape
    a, b, c, d, e, f = upload(warp, images.device).view(count, 6, 1, 1).unbind(1)
    column = torch.arange(width, dtype=torch.int32, device=images.device)
    row = torch.arange(height, dtype=torch.int32, device=images.device)[:, None]
    x, y = a * column + (b * row + c), d * column + (e * row + f)

    border = int(fill == "constant")
    pixels = F.pad(packed(images), (border,) * 4, value=packed_colour(colour))
    across = width + 2 * border
    integer = torch.int32 if pixels.numel() < 2**31 else torch.int64
    first = torch.arange(count, dtype=integer, device=images.device)[:, None, None] * ((height + 2 * border) * across)
    origin = first + border * (across + 1)

    def read(x: Tensor, y: Tensor) -> Tensor:
        return pixels.flatten().index_select(0, (y * across + x + origin).flatten()).view(count, height, width)

    if not bilinear:
        return unpacked(read(into_image(x >> 16, width, fill), into_image(y >> 16, height, fill)))
    left, right, rightness = neighbours(x, width, fill)
    upper, lower, lowness = neighbours(y, height, fill)
    corners = read(left, upper), read(right, upper), read(left, lower), read(right, lower)
    return unpacked(blend(corners, rightness, lowness))


def resample_in_chunks(images: Tensor, warp: Tensor, *resampling: Any) -> Tensor:
    """Calls `resample`, on a CPU in chunks whose intermediates stay in its caches."""
    if images.device.type != "cpu" or len(images) <= CPU_CHUNK:
        return resample(images, warp, *resampling)
    parts = zip(images.split(CPU_CHUNK), warp.split(CPU_CHUNK), strict=True)
    return torch.cat([resample(*part, *resampling) for part in parts])


def into_image(position: Tensor, size: int, fill: str) -> Tensor:
    """Gives the pixels to read at any positions: int32 -> int32, 0 to size - 1; -1 or `size` for a constant fill."""
    if fill == "constant":
        return position.clamp(-1, size)
    if fill == "clamp":
        return position.clamp(0, size - 1)
    position = position.remainder(2 * size)
    return torch.minimum(position, 2 * size - 1 - position)


def neighbours(coordinate: Tensor, size: int, fill: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the pixels before and after coordinates in fixed point, and the weight of the latter: int32 each.

    Weights are out of 2 ** WEIGHT_BITS. A constant fill begins at the border itself: within, the edge pixels reach out
    to it, as in PIL.
    """
    from_centre = coordinate - ONE // 2
    before = from_centre >> 16
    weight = (from_centre >> 16 - WEIGHT_BITS) & (1 << WEIGHT_BITS) - 1
    if fill != "constant":
        return into_image(before, size, fill), into_image(before + 1, size, fill), weight
    outside = (coordinate < 0) | (coordinate >= size * ONE)
    before, after = (position.clamp(0, size - 1).masked_fill(outside, -1) for position in (before, before + 1))
    return before, after, weight


def blend(corners: tuple[Tensor, Tensor, Tensor, Tensor], rightness: Tensor, lowness: Tensor) -> Tensor:
    """Blends packed pixels between four others, rounded to nearest: int32 (N, H, W) each -> int32 (N, H, W)."""
    blended = torch.zeros_like(rightness)
    for shift in (0, 8, 16):
        upper_left, upper_right, lower_left, lower_right = ((corner >> shift).bitwise_and_(255) for corner in corners)
        upper = upper_right.sub_(upper_left).mul_(rightness).add_(upper_left, alpha=1 << WEIGHT_BITS)
        lower = lower_right.sub_(lower_left).mul_(rightness).add_(lower_left, alpha=1 << WEIGHT_BITS)
        value = lower.sub_(upper).mul_(lowness).add_(upper, alpha=1 << WEIGHT_BITS)
        value.add_(1 << 2 * WEIGHT_BITS - 1).bitwise_right_shift_(2 * WEIGHT_BITS)
        blended |= value.bitwise_left_shift_(shift)
    return blended


def packed(images: Tensor) -> Tensor:
    """Packs a pixel into one number, red lowest: uint8 (N, H, W, 3) -> int32 (N, H, W)."""
    return F.pad(images, (0, 1)).view(torch.int32)[..., 0]


def unpacked(pixels: Tensor) -> Tensor:
    """Unpacks int32 (N, H, W) into uint8 (N, H, W, 3), contiguous."""
    return pixels[..., None].view(torch.uint8)[..., :3].contiguous()


def packed_colour(colour: Sequence[int]) -> int:
    red, green, blue = colour
    return red | green << 8 | blue << 16
