"""Augmentation in one pass over memory: gather, warp, greyscale, erase, normalise and lay out.

Source: the resampling is that of PIL (Geometry.c), the greyscale that of its mode L (Convert.c), both in integers, so
that kernel, reference and PIL agree to the last bit; the bilinear one is within a grey level of PIL, which computes it
in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

from .compilation import Compilation
from .dispatch import jit, launcher, tl, triton, use_triton
from .spec import Arguments, Case, OpSpec
from .transfer import upload

ONE = 1 << 16
"""A pixel, in the fixed point of maps."""

FILLS = ("constant", "reflect", "clamp")
"""What lies beyond the border: one colour; the picture mirrored about its edge (the edge pixel repeated); the
nearest edge pixel.
"""

DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)

BLACK = (0, 0, 0)

LONGEST_SIDE = 32767
"""In pixels: as far as int32 reaches in fixed point."""

# A weight of 11 bits is as fine as two of them, multiplied by a byte, allow in int32.
WEIGHT_BITS = 11

# Images of 32 by 32: bilinear resampling takes 35 us an image in chunks of 64, and 60 or more in chunks of 512 (one
# core of a Xeon with 2 MB of second-level cache).
CPU_CHUNK = 64

# A thread of the default four warps computes eight neighbouring bytes or halves; those of an image of 32 by 32 fill
# three blocks. Chosen by the width of the stores, 16 bytes, not by timing.
BLOCK = 1024


def warp_reference(
    images: Tensor, warp: Tensor, fill: str = "constant", colour: Sequence[int] = BLACK, bilinear: bool = False
) -> Tensor:
    """Resamples each image along a map of its own: uint8 (N, H, W, 3) -> the same shape.

    Pixels are read as PIL's `Image.transform` with AFFINE reads them. A warp on the CPU is looked at, whatever the
    images' device: shifted and mirrored images then cost little more than a copy. Coordinates must stay within 32768
    pixels, as PIL's own fixed point demands.

    Args:
        images: uint8 (N, H, W, 3).
        warp: int32 (N, 6), a b c d e f in fixed point: the output pixel in column i and row j is read at (a i + b j +
        c, d i + e j + f),
            in which the half pixel to its centre is included. On the CPU or with the images.
        fill: one of `FILLS`.
        colour: of the constant fill, three bytes.
        bilinear: reads between pixel centres, in place of the nearest.
    """
    if not _readable(warp):
        return resample(images, warp, fill, colour, bilinear)
    whole = whole_pixels(warp, bilinear) & (fill == "constant")
    rest = (~whole).nonzero()[:, 0]
    if len(rest) == len(warp):
        return _resample_in_chunks(images, warp, fill, colour, bilinear)
    straight = torch.where(whole[:, None], warp, warp.new_tensor([ONE, 0, 0, 0, ONE, 0]))
    warped = shift_and_mirror(images, straight, colour)
    if not len(rest):
        return warped
    place = upload(rest, images.device)
    return warped.index_copy_(0, place, _resample_in_chunks(images[place], warp[rest], fill, colour, bilinear))


def _readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without a sync; and at all, which they cannot while a graph is traced."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def whole_pixels(warp: Tensor, bilinear: bool) -> Tensor:
    """Which maps only shift by whole pixels and mirror left to right: int32 (N, 6) -> bool (N,). The nearest pixel
    is always whole.
    """
    a, b, c, d, e, f = warp.unbind(1)
    straight = (a.abs() == ONE) & (b == 0) & (d == 0) & (e == ONE)
    return straight & (c % ONE == ONE // 2) & (f % ONE == ONE // 2) if bilinear else straight


def shift_and_mirror(images: Tensor, warp: Tensor, colour: Sequence[int] = BLACK) -> Tensor:
    """`warp_reference` for maps that `whole_pixels` found, over a constant fill; the warp is on the CPU.

    A shifted row is one run of bytes in the images with a margin, so this is a selection of rows, at the speed of a
    copy.
    """
    count, height, width, channels = images.shape
    device = images.device
    mirrored = warp[:, 0] < 0
    left = ((warp[:, 2] >> 16) - mirrored * (width - 1)).clamp(-width, width)
    top = (warp[:, 5] >> 16).clamp(-height, height)
    margin = max(int(left.abs().max()), int(top.abs().max())) if count else 0
    if margin:
        framed = _framed(images, margin, colour)
        across = width + 2 * margin
        first = torch.arange(count) * (height + 2 * margin) + top + margin
        start = upload((first * across + left + margin) * channels, device)
        starts = start[:, None] + torch.arange(height, device=device) * (across * channels)
        runs = framed.as_strided((framed.numel() - width * channels + 1, width * channels), (1, 1))
        images = runs.index_select(0, starts.flatten()).view(count, height, width, channels)
    else:
        images = images.clone()
    chosen = upload(mirrored.nonzero()[:, 0], device)
    return images.index_copy_(0, chosen, images.index_select(0, chosen).flip(2)) if len(chosen) else images


def _framed(images: Tensor, margin: int, colour: Sequence[int]) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, H + 2 margin, W + 2 margin, 3), with `colour` around each image."""
    if len(set(colour)) == 1:
        return F.pad(images, (0, 0, *[margin] * 4), value=colour[0])
    count, height, width, channels = images.shape
    line = _repeated(colour, width + 2 * margin, images).view(-1, channels)
    framed = line.expand(count, height + 2 * margin, -1, -1).contiguous()
    framed[:, margin:-margin, margin:-margin] = images
    return framed


def _repeated(colour: Sequence[int], width: int, images: Tensor) -> Tensor:
    """A row of pixels of one colour on the images' device: uint8 (3 width,). Its length lets the CPU's loops run at
    full speed.
    """
    return upload(torch.tensor(colour, dtype=torch.uint8).repeat(width), images.device)


def resample(images: Tensor, warp: Tensor, fill: str, colour: Sequence[int], bilinear: bool) -> Tensor:
    """`warp_reference` for any maps. A pixel is gathered as one int32, and a constant fill as a border of one pixel."""
    count, height, width, _ = images.shape
    a, b, c, d, e, f = upload(warp, images.device).view(count, 6, 1, 1).unbind(1)
    column = torch.arange(width, dtype=torch.int32, device=images.device)
    row = torch.arange(height, dtype=torch.int32, device=images.device)[:, None]
    x, y = a * column + (b * row + c), d * column + (e * row + f)

    border = int(fill == "constant")
    pixels = F.pad(_packed(images), (border,) * 4, value=_packed_colour(colour))
    across = width + 2 * border
    integer = torch.int32 if pixels.numel() < 2**31 else torch.int64
    first = torch.arange(count, dtype=integer, device=images.device)[:, None, None] * ((height + 2 * border) * across)
    origin = first + border * (across + 1)

    def read(x: Tensor, y: Tensor) -> Tensor:
        return pixels.flatten().index_select(0, (y * across + x + origin).flatten()).view(count, height, width)

    if not bilinear:
        return _unpacked(read(into_image(x >> 16, width, fill), into_image(y >> 16, height, fill)))
    left, right, rightness = neighbours(x, width, fill)
    upper, lower, lowness = neighbours(y, height, fill)
    corners = read(left, upper), read(right, upper), read(left, lower), read(right, lower)
    return _unpacked(_blend(corners, rightness, lowness))


def _resample_in_chunks(images: Tensor, warp: Tensor, *resampling: Any) -> Tensor:
    """`resample`, on a CPU in chunks whose intermediates stay in its caches."""
    if images.device.type != "cpu" or len(images) <= CPU_CHUNK:
        return resample(images, warp, *resampling)
    parts = zip(images.split(CPU_CHUNK), warp.split(CPU_CHUNK), strict=True)
    return torch.cat([resample(*part, *resampling) for part in parts])


def into_image(position: Tensor, size: int, fill: str) -> Tensor:
    """The pixels that are read at any positions along a side: int32 -> int32, 0 to size - 1; -1 or `size` for a
    constant fill.
    """
    if fill == "constant":
        return position.clamp(-1, size)
    if fill == "clamp":
        return position.clamp(0, size - 1)
    position = position.remainder(2 * size)
    return torch.minimum(position, 2 * size - 1 - position)


def neighbours(coordinate: Tensor, size: int, fill: str) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels before and after coordinates in fixed point along a side, and the weight of the latter, of 2 **
    WEIGHT_BITS: int32 each.

    A constant fill begins at the border itself: within, the edge pixels reach out to it, as in PIL.
    """
    from_centre = coordinate - ONE // 2
    before = from_centre >> 16
    weight = (from_centre >> 16 - WEIGHT_BITS) & (1 << WEIGHT_BITS) - 1
    if fill != "constant":
        return into_image(before, size, fill), into_image(before + 1, size, fill), weight
    outside = (coordinate < 0) | (coordinate >= size * ONE)
    before, after = (position.clamp(0, size - 1).masked_fill(outside, -1) for position in (before, before + 1))
    return before, after, weight


def _blend(corners: tuple[Tensor, Tensor, Tensor, Tensor], rightness: Tensor, lowness: Tensor) -> Tensor:
    """Packed pixels between four others, rounded to nearest: int32 (N, H, W) each -> int32 (N, H, W)."""
    blended = torch.zeros_like(rightness)
    for shift in (0, 8, 16):
        upper_left, upper_right, lower_left, lower_right = ((corner >> shift).bitwise_and_(255) for corner in corners)
        upper = upper_right.sub_(upper_left).mul_(rightness).add_(upper_left, alpha=1 << WEIGHT_BITS)
        lower = lower_right.sub_(lower_left).mul_(rightness).add_(lower_left, alpha=1 << WEIGHT_BITS)
        value = lower.sub_(upper).mul_(lowness).add_(upper, alpha=1 << WEIGHT_BITS)
        value.add_(1 << 2 * WEIGHT_BITS - 1).bitwise_right_shift_(2 * WEIGHT_BITS)
        blended |= value.bitwise_left_shift_(shift)
    return blended


def _packed(images: Tensor) -> Tensor:
    """A pixel in one number, red lowest: uint8 (N, H, W, 3) -> int32 (N, H, W)."""
    return F.pad(images, (0, 1)).view(torch.int32)[..., 0]


def _unpacked(pixels: Tensor) -> Tensor:
    """int32 (N, H, W) -> uint8 (N, H, W, 3), contiguous."""
    return pixels[..., None].view(torch.uint8)[..., :3].contiguous()


def _packed_colour(colour: Sequence[int]) -> int:
    red, green, blue = colour
    return red | green << 8 | blue << 16


def greyscale_reference(images: Tensor, grey: Tensor) -> Tensor:
    """Replaces the colours of some images by PIL's luminance: uint8 (N, H, W, 3), bool (N,) -> the same shape."""
    red, green, blue = (images[..., channel].to(torch.int32) for channel in range(3))
    luminance = (red * 19595 + green * 38470 + blue * 7471 + (1 << 15) >> 16).to(torch.uint8)
    return torch.where(upload(grey, images.device)[:, None, None, None], luminance[..., None], images)


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
    return torch.where(erased, _repeated(colour, width, images), lines).view_as(images)


def normalize_reference(images: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """byte * scale + offset, each rounded to float32, then to `dtype`: uint8 (N, H, W, 3), float32 (3,) twice -> (N, H,
    W, 3).

    Scale and offset are laid out for a whole row: over an innermost dimension of three, the CPU's loops are four times
    slower.
    """
    count, height, width, channels = images.shape
    scale, offset = (upload(tensor, images.device).repeat(width) for tensor in (scale, offset))
    lines = images.reshape(count, height, width * channels)
    return lines.to(torch.float32).mul_(scale).add_(offset).to(dtype).view(images.shape)


def augment_reference(
    images: Tensor,
    index: Tensor | None,
    warp: Tensor | None,
    grey: Tensor | None,
    boxes: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    out_dtype: torch.dtype,
    fill: str,
    colour: Sequence[int],
    bilinear: bool,
    erase_colour: Sequence[int],
) -> Tensor:
    """What `augment` computes, in plain torch."""
    images = images.clone() if index is None else images.index_select(0, upload(index, images.device))
    if warp is not None:
        images = warp_reference(images, warp, fill, colour, bilinear)
    if grey is not None:
        images = greyscale_reference(images, grey)
    if boxes is not None:
        images = erase_reference(images, boxes, erase_colour)
    return images if out_dtype == torch.uint8 else normalize_reference(images, scale, offset, out_dtype)


@jit
def into_image_kernel(position, SIZE: tl.constexpr, REFLECT: tl.constexpr):
    """The pixel to read at any position along a side: mirrored about the edge, or else the nearest."""
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
    """A channel of an image at coordinates in fixed point, as int32. All loads are within the image, wherever the
    coordinates lead.
    """
    byte_ptr = image_ptr + channel
    if BILINEAR:
        from_left, from_top = x - 32768, y - 32768
        left = into_image_kernel(from_left >> 16, WIDTH, REFLECT) * 3
        right = into_image_kernel((from_left >> 16) + 1, WIDTH, REFLECT) * 3
        upper_ptr = byte_ptr + into_image_kernel(from_top >> 16, HEIGHT, REFLECT) * (WIDTH * 3)
        lower_ptr = byte_ptr + into_image_kernel((from_top >> 16) + 1, HEIGHT, REFLECT) * (WIDTH * 3)
        upper_left, upper_right = tl.load(upper_ptr + left).to(tl.int32), tl.load(upper_ptr + right).to(tl.int32)
        lower_left, lower_right = tl.load(lower_ptr + left).to(tl.int32), tl.load(lower_ptr + right).to(tl.int32)
        mask: tl.constexpr = (1 << WEIGHT_BITS) - 1
        rightness = (from_left >> (16 - WEIGHT_BITS)) & mask
        lowness = (from_top >> (16 - WEIGHT_BITS)) & mask
        upper = (upper_left << WEIGHT_BITS) + (upper_right - upper_left) * rightness
        lower = (lower_left << WEIGHT_BITS) + (lower_right - lower_left) * rightness
        value = (upper << WEIGHT_BITS) + (lower - upper) * lowness
        value = (value + (1 << (2 * WEIGHT_BITS - 1))) >> (2 * WEIGHT_BITS)
    else:
        column, row = into_image_kernel(x >> 16, WIDTH, REFLECT), into_image_kernel(y >> 16, HEIGHT, REFLECT)
        value = tl.load(byte_ptr + (row * WIDTH + column) * 3).to(tl.int32)
    if CONSTANT:
        found = (x >= 0) & (x < WIDTH * 65536) & (y >= 0) & (y < HEIGHT * 65536)
        value = tl.where(found, value, (COLOUR >> (8 * channel)) & 255)
    return value


@jit
def augment_kernel(
    output_ptr,
    images_ptr,
    index_ptr,
    warp_ptr,
    grey_ptr,
    boxes_ptr,
    scale_ptr,
    offset_ptr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_WARP: tl.constexpr,
    HAS_GREY: tl.constexpr,
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
    # An element of the block is one channel of one pixel. The three of a pixel repeat its coordinates, so that stores
    # are as contiguous as the output: arithmetic is cheaper than memory.
    sample = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, column, row = offsets % 3, offsets // 3 % WIDTH, offsets // (3 * WIDTH)
    image = tl.load(index_ptr + sample) if HAS_INDEX else sample
    image_ptr = images_ptr + image * (HEIGHT * WIDTH * 3)

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

    for box in range(BOXES):
        box_ptr = boxes_ptr + (sample * BOXES + box) * 4
        between = (tl.load(box_ptr) <= row) & (row < tl.load(box_ptr + 2))
        beside = (tl.load(box_ptr + 1) <= column) & (column < tl.load(box_ptr + 3))
        value = tl.where(between & beside, (ERASE_COLOUR >> (8 * channel)) & 255, value)

    if NORMALIZED:
        # Adding zero makes the product round by itself, as in the reference, where a plain one might be fused with the
        # sum.
        product = tl.fma(value.to(tl.float32), tl.load(scale_ptr + channel), 0.0)
        result = product + tl.load(offset_ptr + channel)
    else:
        result = value
    output = output_ptr + sample * (HEIGHT * WIDTH * 3) + offsets
    tl.store(output, result.to(output_ptr.dtype.element_ty), offsets < HEIGHT * WIDTH * 3)


INPUTS = {
    "images_ptr": "*u8:16",
    "index_ptr": "*i64:16",
    "warp_ptr": "*i32:16",
    "grey_ptr": "*i1:16",
    "boxes_ptr": "*i32:16",
    "scale_ptr": "*fp32:16",
    "offset_ptr": "*fp32:16",
}
STANDARD = {
    "HEIGHT": 32,
    "WIDTH": 32,
    "HAS_INDEX": True,
    "HAS_WARP": True,
    "HAS_GREY": False,
    "BOXES": 0,
    "NORMALIZED": True,
    "BILINEAR": False,
    "CONSTANT": True,
    "REFLECT": False,
    "COLOUR": 0,
    "ERASE_COLOUR": 0,
    "WEIGHT_BITS": WEIGHT_BITS,
    "BLOCK": BLOCK,
}

COMPILATIONS = [
    Compilation(
        kernel=augment_kernel, signature={"output_ptr": f"*{output}:16", **INPUTS}, constexprs={**STANDARD, **others}
    )
    for output, others in (
        ("bf16", {}),
        ("fp16", {"HAS_GREY": True, "BOXES": 64, "BILINEAR": True, "COLOUR": 0x727A7D}),
        (
            "fp32",
            {
                "HEIGHT": 33,
                "WIDTH": 31,
                "HAS_GREY": True,
                "BOXES": 1,
                "BILINEAR": True,
                "CONSTANT": False,
                "REFLECT": True,
            },
        ),
        ("u8", {"HAS_INDEX": False, "NORMALIZED": False, "CONSTANT": False}),
    )
]


@launcher
def launch_augment(
    kernel: Any,
    images: Tensor,
    index: Tensor | None,
    warp: Tensor | None,
    grey: Tensor | None,
    boxes: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    out_dtype: torch.dtype,
    fill: str,
    colour: Sequence[int],
    bilinear: bool,
    erase_colour: Sequence[int],
) -> Tensor:
    """Launches `kernel`, which is `augment_kernel` or its wrapped form, over a new output; tensors on the CPU follow
    the images.
    """
    # Sizes are compiled into the kernel, so that they are numbers even where a graph is traced for all sizes.
    height, width, channels = (int(length) for length in images.shape[1:])
    count = len(images if index is None else index)
    output = torch.empty((count, height, width, channels), dtype=out_dtype, device=images.device)
    optional = index, warp, grey, boxes, scale, offset
    # An absent tensor needs some pointer, which is not read.
    pointers = [images if tensor is None else upload(tensor, images.device) for tensor in optional]
    kernel[(count, triton.cdiv(height * width * channels, BLOCK))](
        output,
        images,
        *pointers,
        HEIGHT=height,
        WIDTH=width,
        HAS_INDEX=index is not None,
        HAS_WARP=warp is not None,
        HAS_GREY=grey is not None,
        BOXES=0 if boxes is None else int(boxes.shape[1]),
        NORMALIZED=out_dtype != torch.uint8,
        BILINEAR=bilinear and warp is not None,
        CONSTANT=fill == "constant" and warp is not None,
        REFLECT=fill == "reflect",
        COLOUR=_packed_colour(colour),
        ERASE_COLOUR=_packed_colour(erase_colour),
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
    boxes: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    out_dtype: torch.dtype,
    fill: str,
    colour: Sequence[int],
    bilinear: bool,
    erase_colour: Sequence[int],
) -> Tensor:
    """Gathers images, then warps, greys, erases and normalises them: (N, H, W, 3) of `out_dtype`, contiguous.

    What is None is left out. All tensors but the images may stay on the CPU; a warp there lets the reference take its
    short cut. On a GPU the values of tensors are not looked at, so that nothing waits: an index beyond the images reads
    foreign memory.

    Args:
        images: uint8 (M, H, W, 3), contiguous: a whole data set.
        index: int64 (N,), which images; None for all in order (N = M).
        warp: int32 (N, 6), the maps, as in `warp_reference`.
        grey: bool (N,), which images lose their colours.
        boxes: int32 (N, K, 4), top, left, bottom, right of what is painted over; empty ones are.
        scale: float32 (3,), by which bytes are multiplied; needed unless `out_dtype` is uint8.
        offset: float32 (3,), what is added then; needed unless `out_dtype` is uint8.
        out_dtype: uint8, float32, bfloat16 or float16.
        fill: one of `FILLS`, what a warp finds beyond the border.
        colour: of the constant fill, three bytes.
        bilinear: a warp reads between pixel centres, in place of the nearest.
        erase_colour: of the boxes, three bytes.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides, device or value.
    """
    arguments = images, index, warp, grey, boxes, scale, offset, out_dtype, fill, colour, bilinear, erase_colour
    _check(*arguments)
    if use_triton(images):
        return launch_augment(wrap_triton(augment_kernel), *arguments)
    return augment_reference(*arguments)


def _check(
    images: Tensor,
    index: Tensor | None,
    warp: Tensor | None,
    grey: Tensor | None,
    boxes: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    out_dtype: torch.dtype,
    fill: str,
    colour: Sequence[int],
    bilinear: bool,
    erase_colour: Sequence[int],
) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}.")
    if images.dim() != 4 or images.shape[3] != 3 or not images.is_contiguous():
        raise ValueError(
            f"images must be contiguous (M, H, W, 3), not {tuple(images.shape)} with strides {images.stride()}."
        )
    if not all(0 < side <= LONGEST_SIDE for side in images.shape[1:3]):
        raise ValueError(f"images must have sides of 1 to {LONGEST_SIDE} pixels, not {tuple(images.shape[1:3])}.")
    if index is not None:
        _check_tensor("index", index, torch.int64, (len(index) if index.dim() else 1,), images.device)
    count = len(images if index is None else index)
    if boxes is not None:
        squares = boxes.shape[1] if boxes.dim() == 3 else 1
        _check_tensor("boxes", boxes, torch.int32, (count, squares, 4), images.device)
    expected = (
        ("warp", warp, torch.int32, (count, 6)),
        ("grey", grey, torch.bool, (count,)),
        ("scale", scale, torch.float32, (3,)),
        ("offset", offset, torch.float32, (3,)),
    )
    for name, tensor, dtype, shape in expected:
        if tensor is not None:
            _check_tensor(name, tensor, dtype, shape, images.device)
    if out_dtype not in DTYPES:
        raise TypeError(f"out_dtype must be uint8, float32, bfloat16 or float16, not {out_dtype}.")
    for name, tensor in (("scale", scale), ("offset", offset)):
        if (tensor is None) != (out_dtype == torch.uint8):
            raise ValueError(f"{name} must be given for every out_dtype but uint8, and for that be None.")
    if fill not in FILLS:
        raise ValueError(f"fill must be one of {', '.join(FILLS)}, not {fill!r}.")
    for name, value in (("colour", colour), ("erase_colour", erase_colour)):
        if len(value) != 3 or not all(0 <= byte <= 255 for byte in value):
            raise ValueError(f"{name} must be three numbers of 0 to 255, not {tuple(value)}.")


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}.")
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous of shape {shape}, not {tuple(tensor.shape)} with strides {tensor.stride()}."
        )
    if tensor.device != device and tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on {device} like images, or on the CPU, not on {tensor.device}.")


def augment_by_indexing(
    images: Tensor,
    index: Tensor | None,
    warp: Tensor | None,
    grey: Tensor | None,
    boxes: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    out_dtype: torch.dtype,
    fill: str,
    colour: Sequence[int],
    bilinear: bool,
    erase_colour: Sequence[int],
) -> Tensor:
    """What `augment` is by definition, a pixel at a time by torch's indexing; normalises in the dtype of `scale`."""
    images = images if index is None else images[index]
    row, column = (
        torch.arange(images.shape[1], device=images.device)[:, None],
        torch.arange(images.shape[2], device=images.device),
    )
    if warp is not None:
        a, b, c, d, e, f = warp.long()[..., None, None].unbind(1)
        images = _read_by_indexing(images, a * column + b * row + c, d * column + e * row + f, fill, colour, bilinear)
    if grey is not None:
        luminance = (images * _row([19595, 38470, 7471], images)).sum(-1, keepdim=True) + (1 << 15) >> 16
        images = torch.where(grey[:, None, None, None], luminance, images)
    if boxes is not None:
        top, left, bottom, right = boxes[..., None, None].unbind(2)
        erased = ((top <= row) & (row < bottom) & (left <= column) & (column < right)).any(1)
        images = torch.where(erased[..., None], _row(erase_colour, images).to(images.dtype), images)
    return images.to(out_dtype) if out_dtype == torch.uint8 else (images * scale + offset).to(out_dtype)


def _row(values: Sequence[int], like: Tensor) -> Tensor:
    """int64 (len(values),), filled in on the device of `like`: a copy from the CPU would wait, which a captured
    graph forbids.
    """
    return torch.stack([like.new_full((), value, dtype=torch.int64) for value in values])


def _read_by_indexing(images: Tensor, x: Tensor, y: Tensor, fill: str, colour: Sequence[int], bilinear: bool) -> Tensor:
    """Images at coordinates in fixed point: uint8 (N, H, W, 3), int64 (N, H, W) twice -> int64 (N, H, W, 3)."""
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
    return torch.where(inside[..., None], pixels, _row(colour, pixels))


def augment_exactly(scale: Tensor | None, out_dtype: torch.dtype, **others: Any) -> Tensor:
    """`augment_by_indexing` in float64, but for bytes."""
    return augment_by_indexing(scale=scale, out_dtype=out_dtype if scale is None else scale.dtype, **others)


def _arguments(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
    """A data set with as many images as are drawn from it; every other map shifts and mirrors alone, or all where
    `shifts` says so.
    """
    count, (height, width) = shape["count"], shape["size"]
    tensors = {
        "images": torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, device=device),
        "index": torch.randint(0, max(count, 1), (count,), device=device),
        "warp": _shifts_and_mirrors(count, width, device),
        "grey": torch.rand(count, device=device) < 0.3,
        "boxes": torch.randint(
            -2, max(height, width) + 2, (count, shape.get("boxes", 2), 4), dtype=torch.int32, device=device
        ),
        "scale": torch.tensor([0.0171, 0.0175, 0.0174], device=device),
        "offset": torch.tensor([-2.118, -2.036, -1.804], device=device),
    }
    if not shape.get("shifts"):
        tensors["warp"][::2] = (torch.randn(len(tensors["warp"][::2]), 6, device=device) * ONE).int()
        tensors["warp"][::2, 2::3] *= width
    absent = (*shape.get("absent", ()), *(("scale", "offset") if dtype == torch.uint8 else ()))
    options = {"fill": shape.get("fill", "constant"), "bilinear": shape.get("bilinear", False)}
    return {
        **tensors,
        **dict.fromkeys(absent),
        **options,
        "out_dtype": dtype,
        "colour": (125, 123, 114),
        "erase_colour": (1, 2, 255),
    }


def _shifts_and_mirrors(count: int, width: int, device: torch.device) -> Tensor:
    """Maps that shift by up to four pixels each way and mirror one time in two: int32 (N, 6)."""
    across, down = (torch.randint(-4, 5, (2, count), device=device) * ONE + ONE // 2).unbind()
    sign = torch.randint(0, 2, (count,), device=device) * 2 - 1
    across = torch.where(sign < 0, (width - 1) * ONE + across, across)
    zero, one = torch.zeros_like(sign), torch.full_like(sign, ONE)
    return torch.stack([sign * ONE, zero, across, zero, one, down], dim=1).int()


def _bytes_moved(arguments: Arguments) -> int:
    """The bytes that are moved; of the data set only the images that are drawn count."""
    images, per_image = arguments["images"], ("index", "warp", "grey", "boxes")
    drawn = sum(arguments[name].nbytes for name in per_image if arguments[name] is not None)
    return drawn + images.numel() * (1 + arguments["out_dtype"].itemsize)


STANDARD_POLICY = {"size": (32, 32), "absent": ("grey", "boxes"), "shifts": True}

SPEC = OpSpec(
    op=augment,
    reference=augment_reference,
    launch=partial(launch_augment, augment_kernel),
    make=_arguments,
    exact=augment_exactly,
    rival=augment_by_indexing,
    cases=(
        *(
            Case(f"17x23-{fill}-{how}", {"count": 5, "size": (17, 23), "fill": fill, "bilinear": how == "bilinear"})
            for fill in FILLS
            for how in ("nearest", "bilinear")
        ),
        *(
            Case(f"without-{name}", {"count": 3, "size": (5, 8), "absent": (name,)})
            for name in ("index", "warp", "grey", "boxes")
        ),
        Case("images-alone", {"count": 3, "size": (5, 8), "absent": ("index", "warp", "grey", "boxes")}),
        Case("1x1", {"count": 2, "size": (1, 1), "fill": "reflect", "bilinear": True}),
        Case("33x31", {"count": 2, "size": (33, 31), "bilinear": True}),
        Case("no-images", {"count": 0, "size": (5, 8)}),
        Case("one-image", {"count": 1, "size": (5, 8), "boxes": 64}),
        Case("two-cpu-chunks", {"count": CPU_CHUNK + 3, "size": (2, 3)}),
        Case("512-standard", {"count": 512, **STANDARD_POLICY}, of_a_network=True),
        Case(
            "512-bilinear-grey-boxes", {"count": 512, "size": (32, 32), "bilinear": True, "boxes": 1}, of_a_network=True
        ),
        Case("32768-standard", {"count": 32768, **STANDARD_POLICY}, of_a_network=True),
    ),
    bytes_moved=_bytes_moved,
    summary="Gathers images by index, then warps, greys, erases and normalises them, NHWC.",
    dtypes=(torch.float32, torch.float16, torch.bfloat16, torch.uint8),
)
