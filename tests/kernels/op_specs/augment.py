"""The declaration of `augment`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcifar.kernels.augment import augment
from fastcifar.kernels.warp import CPU_CHUNK, ONE, WEIGHT_BITS

from .declaration import Arguments, Case, OpSpec


def make(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
    """Makes a data set with as many images as are drawn from it.

    Every other map only shifts and mirrors, or all of them where `shifts` says so.
    """
    count, (height, width) = shape["count"], shape["size"]
    boxes = (count, shape.get("boxes", 2), 4)
    tensors = {
        "images": torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, device=device),
        "index": torch.randint(0, max(count, 1), (count,), device=device),
        "warp": shifts_and_mirrors(count, width, device),
        "grey": torch.rand(count, device=device) < 0.3,
        "shift": torch.randint(-300, 300, (count, 3), dtype=torch.int32, device=device),
        "boxes": torch.randint(-2, max(height, width) + 2, boxes, dtype=torch.int32, device=device),
        "scale": torch.tensor([0.0171, 0.0175, 0.0174], device=device),
        "offset": torch.tensor([-2.118, -2.036, -1.804], device=device),
    }
    if not shape.get("shifts"):
        tensors["warp"][::2] = (torch.randn(len(tensors["warp"][::2]), 6, device=device) * ONE).int()
        tensors["warp"][::2, 2::3] *= width
    return {
        **tensors,
        **dict.fromkeys((*shape.get("absent", ()), *(("scale", "offset") if dtype == torch.uint8 else ()))),
        "out_dtype": dtype,
        "fill": shape.get("fill", "constant"),
        "colour": (125, 123, 114),
        "bilinear": shape.get("bilinear", False),
        "erase_colour": (1, 2, 255),
    }


def shifts_and_mirrors(count: int, width: int, device: torch.device) -> Tensor:
    """Draws maps that shift by up to four pixels each way and mirror one time in two: int32 (N, 6)."""
    across, down = (torch.randint(-4, 5, (2, count), device=device) * ONE + ONE // 2).unbind()
    sign = torch.randint(0, 2, (count,), device=device) * 2 - 1
    across = torch.where(sign < 0, (width - 1) * ONE + across, across)
    zero, one = torch.zeros_like(sign), torch.full_like(sign, ONE)
    return torch.stack([sign * ONE, zero, across, zero, one, down], dim=1).int()


def by_indexing(
    images, index, warp, grey, shift, boxes, scale, offset, out_dtype, fill, colour, bilinear, erase_colour
) -> Tensor:
    """Computes what `augment` is by definition, a pixel at a time by indexing; normalises in the dtype of `scale`."""
    images = images if index is None else images[index]
    row = torch.arange(images.shape[1], device=images.device)[:, None]
    column = torch.arange(images.shape[2], device=images.device)
    if warp is not None:
        a, b, c, d, e, f = warp.long()[..., None, None].unbind(1)
        images = read_by_indexing(images, a * column + b * row + c, d * column + e * row + f, fill, colour, bilinear)
    if grey is not None:
        luminance = (images * row_of([19595, 38470, 7471], images)).sum(-1, keepdim=True) + (1 << 15) >> 16
        images = torch.where(grey[:, None, None, None], luminance, images)
    if shift is not None:
        images = (images.long() + shift.long()[:, None, None]).clamp(0, 255)
    if boxes is not None:
        top, left, bottom, right = boxes[..., None, None].unbind(2)
        erased = ((top <= row) & (row < bottom) & (left <= column) & (column < right)).any(1)
        images = torch.where(erased[..., None], row_of(erase_colour, images).to(images.dtype), images)
    return images.to(out_dtype) if scale is None else (images * scale + offset).to(out_dtype)


def row_of(values: Sequence[int], like: Tensor) -> Tensor:
    """Fills in int64 (len(values),) on the device of `like`.

    A copy from the CPU would wait, which a captured graph forbids.
    """
    return torch.stack([like.new_full((), value, dtype=torch.int64) for value in values])


def read_by_indexing(images: Tensor, x: Tensor, y: Tensor, fill: str, colour: Sequence[int], bilinear: bool) -> Tensor:
    """Reads images at coordinates in fixed point: uint8 (N, H, W, 3), int64 (N, H, W) twice -> int64 (N, H, W, 3)."""
    count, height, width, _ = images.shape
    sample = torch.arange(count, device=images.device)[:, None, None]

    def place(position: Tensor, size: int) -> Tensor:
        mirrored = position % (2 * size)
        return torch.minimum(mirrored, 2 * size - 1 - mirrored) if fill == "reflect" else position.clamp(0, size - 1)

    def read(x: Tensor, y: Tensor) -> Tensor:
        return images[sample, place(y, height), place(x, width)].long()

    if bilinear:
        left, upper = x - ONE // 2 >> 16, y - ONE // 2 >> 16
        rightness, lowness = (((along - ONE // 2) % ONE >> 16 - WEIGHT_BITS)[..., None] for along in (x, y))
        whole = 1 << WEIGHT_BITS
        above = read(left, upper) * (whole - rightness) + read(left + 1, upper) * rightness
        below = read(left, upper + 1) * (whole - rightness) + read(left + 1, upper + 1) * rightness
        pixels = above * (whole - lowness) + below * lowness + whole**2 // 2 >> 2 * WEIGHT_BITS
    else:
        pixels = read(x >> 16, y >> 16)
    if fill != "constant":
        return pixels
    inside = (x >= 0) & (x < width * ONE) & (y >= 0) & (y < height * ONE)
    return torch.where(inside[..., None], pixels, row_of(colour, pixels))


def bytes_moved(arguments: Arguments) -> int:
    """Counts the bytes moved; of the data set, only the images that are drawn."""
    drawn = [arguments[name] for name in ("index", "warp", "grey", "shift", "boxes") if arguments[name] is not None]
    return sum(tensor.nbytes for tensor in drawn) + arguments["images"].numel() * (1 + arguments["out_dtype"].itemsize)


STANDARD = {"size": (32, 32), "absent": ("grey", "shift", "boxes"), "shifts": True}

SPEC = OpSpec(
    op=augment,
    make=make,
    rival=by_indexing,
    cases=(
        Case("images-alone", {"count": 3, "size": (5, 8), "absent": ("index", "warp", "grey", "shift", "boxes")}),
        *(
            Case(f"17x23-{fill}-{how}", {"count": 5, "size": (17, 23), "fill": fill, "bilinear": how == "bilinear"})
            for how in ("bilinear", "nearest")
            for fill in ("constant", "reflect", "clamp")
        ),
        *(
            Case(f"without-{name}", {"count": 3, "size": (5, 8), "absent": (name,)})
            for name in ("index", "warp", "grey", "shift", "boxes")
        ),
        Case("1x1", {"count": 2, "size": (1, 1), "fill": "reflect", "bilinear": True}),
        Case("33x31", {"count": 2, "size": (33, 31), "bilinear": True}),
        Case("no-images", {"count": 0, "size": (5, 8)}),
        Case("one-image", {"count": 1, "size": (5, 8), "boxes": 64}),
        Case("two-cpu-chunks", {"count": CPU_CHUNK + 3, "size": (2, 3)}),
        Case("512-standard", {"count": 512, **STANDARD}, of_a_network=True),
        Case("512-bilinear-grey-boxes", {"count": 512, "size": (32, 32), "bilinear": True, "boxes": 1}, True),
        Case("512-reflect", {"count": 512, "size": (33, 31), "fill": "reflect", "bilinear": True, "boxes": 64}, True),
        Case("32768-standard", {"count": 32768, **STANDARD}, of_a_network=True),
    ),
    bytes_moved=bytes_moved,
    summary="Gathers images by index, then warps, greys, shifts, erases and normalises them, NHWC.",
    dtypes=(torch.float32, torch.float16, torch.bfloat16, torch.uint8),
    same_bits=True,
)
