"""Augmentation in one pass over memory: gather, warp, greyscale, shift, erase, normalise and lay out.

Source: the resampling is that of PIL (Geometry.c), the greyscale that of its mode L (Convert.c), both in integers, so
that kernel and reference agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .checks import FLOATS, check_tensor, described
from .dispatch import jit, launch, tl, triton, use_triton
from .transfer import upload
from .warp import BLACK, WEIGHT_BITS, packed_colour, repeated, warp_reference

LONGEST_SIDE = 32767
"""The longest side of an image in pixels, which is as far as int32 reaches in fixed point."""

# A thread of the default four warps computes eight neighbouring bytes or halves; those of an image of 32 by 32 fill
# three blocks. Chosen by the width of the stores, 16 bytes, not by timing.
BLOCK = 1024


def luma(images: Tensor) -> Tensor:
    """The ITU-R 601-2 transform in fixed point (`L24` in PIL's Convert.c): uint8 (N, H, W, 3) -> int32 (N, H, W)."""
    red, green, blue = (channel.int() for channel in images.unbind(3))
    return red.mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000) >> 16


def greyscale_reference(images: Tensor, grey: Tensor) -> Tensor:
    """Replaces the colours of some images by their luma: uint8 (N, H, W, 3), bool (N,) -> the same shape."""
    chosen = upload(grey, images.device)[:, None, None, None]
    return torch.where(chosen, luma(images).to(torch.uint8)[..., None], images)


def shift_reference(images: Tensor, shift: Tensor) -> Tensor:
    """Adds to every channel, within 0 to 255: uint8 (N, H, W, 3), int32 (N, 3) -> the same shape."""
    shifted = images.int() + upload(shift, images.device)[:, None, None]
    return shifted.clamp_(0, 255).to(torch.uint8)


def erase_reference(images: Tensor, boxes: Tensor, colour: Sequence[int] = BLACK) -> Tensor:
    """Paints over boxes: uint8 (N, H, W, 3), int32 (N, K, 4) of top, left, bottom, right -> the same shape."""
    count, height, width, channels = images.shape
    top, left, bottom, right = upload(boxes, images.device).unsqueeze(-1).unbind(2)
    row = torch.arange(height, dtype=torch.int32, device=images.device)
    column = torch.arange(width * channels, dtype=torch.int32, device=images.device) // channels
    # Their product counts the boxes over each pixel, in one call for any number of them.
    rows, columns = ((top <= row) & (row < bottom)).float(), ((left <= column) & (column < right)).float()
    erased = torch.matmul(rows.transpose(1, 2), columns) > 0
    lines = images.reshape(count, height, width * channels)
    return torch.where(erased, repeated(colour, width, images), lines).view_as(images)


def normalize_reference(images: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns byte * scale + offset, each rounded to float32, then to `dtype`.

    Images are uint8 (N, H, W, 3), scale and offset float32 (3,). These are laid out for a whole row: over an innermost
    dimension of three, the CPU's loops are four times slower.
    """
    count, height, width, channels = images.shape
    scale, offset = (upload(tensor, images.device).repeat(width) for tensor in (scale, offset))
    lines = images.reshape(count, height, width * channels)
    return lines.to(torch.float32).mul_(scale).add_(offset).to(dtype).view(images.shape)


class Inputs(NamedTuple):
    """The arguments of `augment`, which explains them."""

    images: Tensor
    index: Tensor | None
    warp: Tensor | None
    grey: Tensor | None
    shift: Tensor | None
    boxes: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    out_dtype: torch.dtype
    fill: str
    colour: Sequence[int]
    bilinear: bool
    erase_colour: Sequence[int]


def augment_reference(*arguments: Any) -> Tensor:
    """Computes what `augment` does, from the same arguments, in plain torch."""
    given = Inputs(*arguments)
    images = given.images
    images = images.clone() if given.index is None else images.index_select(0, upload(given.index, images.device))
    if given.warp is not None:
        images = warp_reference(images, given.warp, given.fill, given.colour, given.bilinear)
    if given.grey is not None:
        images = greyscale_reference(images, given.grey)
    if given.shift is not None:
        images = shift_reference(images, given.shift)
    if given.boxes is not None:
        images = erase_reference(images, given.boxes, given.erase_colour)
    if given.scale is None or given.offset is None:
        return images
    return normalize_reference(images, given.scale, given.offset, given.out_dtype)


@jit
def into_image_kernel(position, SIZE: tl.constexpr, REFLECT: tl.constexpr):
    """Gives the pixel to read at any position along a side: mirrored about the edge, or else the nearest."""
    if REFLECT:
        position = tl.where(position < 0, -1 - position, position) % (2 * SIZE)
        return tl.minimum(position, 2 * SIZE - 1 - position)
    else:
        return tl.minimum(tl.maximum(position, 0), SIZE - 1)


@jit
def read_kernel(
    image_ptr,
    x,
    y,
    channel,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BILINEAR: tl.constexpr,
    CONSTANT: tl.constexpr,
    REFLECT: tl.constexpr,
    COLOUR: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
):
    """Reads a channel of an image at any coordinates in fixed point, as int32; all loads are within the image."""
    byte_ptr = image_ptr + channel
    if BILINEAR:
        from_left, from_top = x - 32768, y - 32768
        left = into_image_kernel(from_left >> 16, WIDTH, REFLECT) * 3
        right = into_image_kernel((from_left >> 16) + 1, WIDTH, REFLECT) * 3
        upper_ptr = byte_ptr + into_image_kernel(from_top >> 16, HEIGHT, REFLECT) * (WIDTH * 3)
        lower_ptr = byte_ptr + into_image_kernel((from_top >> 16) + 1, HEIGHT, REFLECT) * (WIDTH * 3)
        upper_left, upper_right = tl.load(upper_ptr + left).to(tl.int32), tl.load(upper_ptr + right).to(tl.int32)
        lower_left, lower_right = tl.load(lower_ptr + left).to(tl.int32), tl.load(lower_ptr + right).to(tl.int32)
        mask: tl.constexpr = (1 << WEIGHT_BITS) - 1  # pyright: ignore[reportOperatorIssue]
        rightness = (from_left >> (16 - WEIGHT_BITS)) & mask
        lowness = (from_top >> (16 - WEIGHT_BITS)) & mask
        upper = (upper_left << WEIGHT_BITS) + (upper_right - upper_left) * rightness
        lower = (lower_left << WEIGHT_BITS) + (lower_right - lower_left) * rightness
        value = (upper << WEIGHT_BITS) + (lower - upper) * lowness
        value = (value + (1 << (2 * WEIGHT_BITS - 1))) >> (2 * WEIGHT_BITS)  # pyright: ignore[reportOperatorIssue]
    else:
        column, row = into_image_kernel(x >> 16, WIDTH, REFLECT), into_image_kernel(y >> 16, HEIGHT, REFLECT)
        value = tl.load(byte_ptr + (row * WIDTH + column) * 3).to(tl.int32)
    if CONSTANT:
        found = (x >= 0) & (x < WIDTH * 65536) & (y >= 0) & (y < HEIGHT * 65536)
        value = tl.where(found, value, (COLOUR >> (8 * channel)) & 255)
    return value


@jit
def paint_kernel(value, boxes_ptr, row, column, channel, BOXES: tl.constexpr, COLOUR: tl.constexpr):
    """Paints over those values that lie in one of a sample's boxes."""
    for box in range(BOXES):
        box_ptr = boxes_ptr + box * 4
        between = (tl.load(box_ptr) <= row) & (row < tl.load(box_ptr + 2))
        beside = (tl.load(box_ptr + 1) <= column) & (column < tl.load(box_ptr + 3))
        value = tl.where(between & beside, (COLOUR >> (8 * channel)) & 255, value)
    return value


@jit
def augment_kernel(
    output_ptr,
    images_ptr,
    index_ptr,
    warp_ptr,
    grey_ptr,
    shift_ptr,
    boxes_ptr,
    scale_ptr,
    offset_ptr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_WARP: tl.constexpr,
    HAS_GREY: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BOXES: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BILINEAR: tl.constexpr,
    CONSTANT: tl.constexpr,
    REFLECT: tl.constexpr,
    COLOUR: tl.constexpr,
    ERASE_COLOUR: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # An element of the block is one channel of one pixel. The three channels of a pixel repeat its coordinates, so that
    # stores are as contiguous as the output: arithmetic is cheaper than memory.
    sample = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, column, row = offsets % 3, offsets // 3 % WIDTH, offsets // (3 * WIDTH)
    image_ptr = images_ptr + (tl.load(index_ptr + sample) if HAS_INDEX else sample) * (HEIGHT * WIDTH * 3)

    if HAS_WARP:
        map_ptr = warp_ptr + sample * 6
        x = tl.load(map_ptr) * column + tl.load(map_ptr + 1) * row + tl.load(map_ptr + 2)
        y = tl.load(map_ptr + 3) * column + tl.load(map_ptr + 4) * row + tl.load(map_ptr + 5)
    else:
        x, y = column << 16, row << 16
    value = read_kernel(image_ptr, x, y, channel, HEIGHT, WIDTH, BILINEAR, CONSTANT, REFLECT, COLOUR, WEIGHT_BITS)

    if HAS_GREY:  # noqa: SIM102 - known when the kernel is compiled, unlike the next.
        if tl.load(grey_ptr + sample):
            red = read_kernel(image_ptr, x, y, 0, HEIGHT, WIDTH, BILINEAR, CONSTANT, REFLECT, COLOUR, WEIGHT_BITS)
            green = read_kernel(image_ptr, x, y, 1, HEIGHT, WIDTH, BILINEAR, CONSTANT, REFLECT, COLOUR, WEIGHT_BITS)
            blue = read_kernel(image_ptr, x, y, 2, HEIGHT, WIDTH, BILINEAR, CONSTANT, REFLECT, COLOUR, WEIGHT_BITS)
            value = (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16

    if HAS_SHIFT:
        value = tl.minimum(tl.maximum(value + tl.load(shift_ptr + sample * 3 + channel), 0), 255)
    value = paint_kernel(value, boxes_ptr + sample * BOXES * 4, row, column, channel, BOXES, ERASE_COLOUR)
    if NORMALIZED:
        # Adding zero rounds the product by itself, as in the reference; a plain product might be fused with the sum.
        product = tl.fma(value.to(tl.float32), tl.load(scale_ptr + channel), 0.0)
        value = product + tl.load(offset_ptr + channel)
    output = output_ptr + sample * (HEIGHT * WIDTH * 3) + offsets
    tl.store(output, value.to(output_ptr.dtype.element_ty), offsets < HEIGHT * WIDTH * 3)


def launch_augment(kernel: Any, given: Inputs) -> Tensor:
    """Launches `augment_kernel`, wrapped; tensors on the CPU are copied to the device of the images."""
    images, warps = given.images, given.warp is not None
    # Sizes are compiled into the kernel, so that they are numbers even where a graph is traced for all sizes.
    height, width, channels = (int(length) for length in images.shape[1:])
    count = len(images if given.index is None else given.index)
    output = torch.empty((count, height, width, channels), dtype=given.out_dtype, device=images.device)
    # An absent tensor needs some pointer, which is not read.
    pointers = [images if tensor is None else upload(tensor, images.device) for tensor in given[1:8]]
    launch(
        kernel,
        (count, triton.cdiv(height * width * channels, BLOCK)),
        output,
        images,
        *pointers,
        HEIGHT=height,
        WIDTH=width,
        HAS_INDEX=given.index is not None,
        HAS_WARP=warps,
        HAS_GREY=given.grey is not None,
        HAS_SHIFT=given.shift is not None,
        BOXES=0 if given.boxes is None else int(given.boxes.shape[1]),
        NORMALIZED=given.out_dtype != torch.uint8,
        BILINEAR=given.bilinear and warps,
        CONSTANT=given.fill == "constant" and warps,
        REFLECT=given.fill == "reflect",
        COLOUR=packed_colour(given.colour),
        ERASE_COLOUR=packed_colour(given.erase_colour),
        WEIGHT_BITS=WEIGHT_BITS,
        BLOCK=BLOCK,
    )
    return output


@triton_op("fastcifar::augment", mutates_args=())
def augment(
    images: Tensor,
    index: Tensor | None,
    warp: Tensor | None,
    grey: Tensor | None,
    shift: Tensor | None,
    boxes: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    out_dtype: torch.dtype,
    fill: str,
    colour: Sequence[int],
    bilinear: bool,
    erase_colour: Sequence[int],
) -> Tensor:
    """Gathers images, then warps, greys, shifts, erases and normalises them: (N, H, W, 3) of `out_dtype`, contiguous.

    Steps whose arguments are None are left out. All tensors but the images may stay on the CPU; a warp there lets the
    reference take its short cut. On a GPU the values of tensors are not looked at, so that nothing waits: an index
    beyond the images reads foreign memory.

    Args:
        images: uint8 (M, H, W, 3), contiguous: a whole data set.
        index: int64 (N,), which images; None for all in order (N = M).
        warp: int32 (N, 6), the maps, as in `warp.warp_reference`.
        grey: bool (N,), which images lose their colours.
        shift: int32 (N, 3), what is added to the channels of each image, within 0 to 255.
        boxes: int32 (N, K, 4), top, left, bottom and right of what is painted over; a box may be empty.
        scale: float32 (3,), by which bytes are multiplied; needed unless `out_dtype` is uint8.
        offset: float32 (3,), added after that; needed unless `out_dtype` is uint8.
        out_dtype: uint8, float32, bfloat16 or float16.
        fill: constant, reflect or clamp, as in `warp.warp_reference`.
        colour: the three bytes of the constant fill.
        bilinear: interpolates between pixel centres instead of taking the nearest pixel.
        erase_colour: the three bytes with which boxes are painted.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides, device or value.
    """
    given = Inputs(
        images, index, warp, grey, shift, boxes, scale, offset, out_dtype, fill, colour, bilinear, erase_colour
    )
    check(given)
    return launch_augment(wrap_triton(augment_kernel), given) if use_triton(images) else augment_reference(*given)


def check(given: Inputs) -> None:
    images, index, boxes = given.images, given.index, given.boxes
    check_tensor("images", images, torch.uint8, images.shape, images.device)
    if images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be (M, H, W, 3), not {described(images)}.")
    if not all(0 < side <= LONGEST_SIDE for side in images.shape[1:3]):
        raise ValueError(f"images must have sides of 1 to {LONGEST_SIDE} pixels, not {tuple(images.shape[1:3])}.")
    count = len(images) if index is None else index.numel()
    squares = boxes.shape[1] if boxes is not None and boxes.dim() == 3 else 1
    expected = {
        "index": (torch.int64, (count,)),
        "warp": (torch.int32, (count, 6)),
        "grey": (torch.bool, (count,)),
        "shift": (torch.int32, (count, 3)),
        "boxes": (torch.int32, (count, squares, 4)),
        "scale": (torch.float32, (3,)),
        "offset": (torch.float32, (3,)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = getattr(given, name)
        if tensor is not None:
            device = tensor.device if tensor.device.type == "cpu" else images.device
            check_tensor(name, tensor, dtype, shape, device)
    if given.out_dtype not in (torch.uint8, *FLOATS):
        raise TypeError(f"out_dtype must be uint8, float32, bfloat16 or float16, not {given.out_dtype}.")
    for name in ("scale", "offset"):
        if (getattr(given, name) is None) != (given.out_dtype == torch.uint8):
            raise ValueError(f"{name} must be given for every out_dtype but uint8, and for that be None.")
