"""Resize one box of each of many images at once on a GPU, by two Triton kernels.

The result equals that of `box_resize.resize_boxes` bit for bit: the same whole weights are summed
in int32, and rounding to a multiple of a power of two is an arithmetic shift. The kernels read
pixels where the decoder left them, so no image is copied, and no kernel is launched per image.

Shapes: N images with 3 channels, S side of the result, T taps of the filter, R rows of the tallest
box of a group.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mae_et.data.device.box_resize import ONE, QUARTERS, filter_taps, groups_of_boxes
from mae_et.data.device_copy import copy_to
from mae_et.data.images.boxes import PixelBox

MAX_NUMBERS = 2**26
"""Maximum numbers between the kernels, unless one image has more: 128 MiB in int16."""
BLOCK_Y, BLOCK_X = 16, 64
NARROW_SHIFT = (ONE // QUARTERS).bit_length() - 1
SQUARE_SHIFT = (ONE * QUARTERS).bit_length() - 1


def resize_boxes(
    images: Sequence[Tensor], boxes: Sequence[PixelBox], flips: Sequence[bool], size: int
) -> Tensor:
    """Resize a box of each image [3 H W] to a square, like `box_resize.resize_boxes`.

    The images must stay allocated until the current stream has run the kernels, as they do if freed
    to the caching allocator on that stream.
    """
    groups = list(groups_of_boxes(boxes, lambda side: 3 * size * max(size, side), MAX_NUMBERS))
    rows = [_row(images[i], boxes[i], flips[i], i) for group in groups for i in group]
    table = copy_to(torch.tensor(rows), images[0].device)
    resized = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=table.device)
    for group, part in zip(groups, table.split([len(group) for group in groups]), strict=True):
        height = max(boxes[i][2] for i in group)
        longest = max(height, *(boxes[i][3] for i in group))
        # Rows and columns of an image in turn: [2N S] and [2N S T].
        first, weights = filter_taps(part[:, 3:5].flatten(), size, longest)
        filters = first.int(), weights.int(), weights.shape[-1]
        narrow = torch.empty(
            len(group), 3, height, size, dtype=torch.int16, device=table.device
        )  # in quarters of a level
        blocks = triton.cdiv(size, BLOCK_X)
        grid = (3 * len(group), triton.cdiv(height, BLOCK_Y), blocks)
        _narrow[grid](part, *filters, narrow, size, height, NARROW_SHIFT, BLOCK_Y, BLOCK_X)
        grid = (3 * len(group), triton.cdiv(size, BLOCK_Y), blocks)
        _square[grid](part, *filters, narrow, resized, size, height, SQUARE_SHIFT, BLOCK_Y, BLOCK_X)
    return resized


def _row(image: Tensor, box: PixelBox, flip: bool, place: int) -> tuple[int, ...]:
    """Return the eight numbers that describe an image, of any strides, to the kernels."""
    top, left, height, width = box
    channel, row, column = image.stride()
    start = image.data_ptr() + top * row + left * column
    return start, channel, row, height, width, flip, place, column


# No argument is specialised, so that one compilation serves every batch and stage.
_ARGUMENTS = ["table", "first", "weights", "taps", "narrow", "resized", "size", "rows"]


@triton.jit(do_not_specialize=_ARGUMENTS)
def _narrow(  # type: ignore[no-untyped-def]
    table, first, weights, taps, narrow, size, rows,
    shift: tl.constexpr, block_y: tl.constexpr, block_x: tl.constexpr,
):  # fmt: skip
    """Filter the rows of each box: int16 [N 3 R S] in quarters of a level."""
    plane = tl.program_id(0)
    image = plane // 3
    y = tl.program_id(1) * block_y + tl.arange(0, block_y)
    x = tl.program_id(2) * block_x + tl.arange(0, block_x)
    entry = table + image * 8
    pixels = tl.load(entry).to(tl.pointer_type(tl.uint8)) + (plane % 3) * tl.load(entry + 1)
    lines = pixels + y * tl.load(entry + 2)
    height = tl.load(entry + 3).to(tl.int32)
    width = tl.load(entry + 4).to(tl.int32)
    step = tl.load(entry + 7).to(tl.int32)
    place = (2 * image + 1) * size + x
    start = tl.load(first + place, mask=x < size, other=0)
    # Weights beyond the box are zero; blocks below it have no taps.
    count = (4 * tl.maximum(width, size) + size - 1) // size + 1
    count = tl.where(tl.program_id(1) * block_y < height, count, 0)
    sums = tl.full((block_y, block_x), 0, tl.int32)
    for tap in range(count):
        column = start + tap
        inside = (x < size) & (column < width)
        weight = tl.load(weights + place * taps + tap, mask=inside, other=0)
        mask = (y < height)[:, None] & inside[None, :]
        pixel = tl.load(lines[:, None] + column[None, :] * step, mask=mask, other=0)
        sums += weight[None, :] * pixel.to(tl.int32)
    rounded = (sums + (1 << (shift - 1))) >> shift
    line = plane.to(tl.int64) * rows + y
    mask = (y < height)[:, None] & (x < size)[None, :]
    tl.store(narrow + line[:, None] * size + x[None, :], rounded.to(tl.int16), mask=mask)


@triton.jit(do_not_specialize=_ARGUMENTS)
def _square(  # type: ignore[no-untyped-def]
    table, first, weights, taps, narrow, resized, size, rows,
    shift: tl.constexpr, block_y: tl.constexpr, block_x: tl.constexpr,
):  # fmt: skip
    """Filter the columns of `_narrow`'s result, and write each image to its place in the batch."""
    plane = tl.program_id(0)
    image = plane // 3
    y = tl.program_id(1) * block_y + tl.arange(0, block_y)
    x = tl.program_id(2) * block_x + tl.arange(0, block_x)
    entry = table + image * 8
    height = tl.load(entry + 3).to(tl.int32)
    place = 2 * image * size + y
    start = tl.load(first + place, mask=y < size, other=0)
    count = (4 * tl.maximum(height, size) + size - 1) // size + 1
    sums = tl.full((block_y, block_x), 0, tl.int32)
    for tap in range(count):
        row = start + tap
        inside = (y < size) & (row < height)
        weight = tl.load(weights + place * taps + tap, mask=inside, other=0)
        line = plane.to(tl.int64) * rows + row
        mask = inside[:, None] & (x < size)[None, :]
        level = tl.load(narrow + line[:, None] * size + x[None, :], mask=mask, other=0)
        sums += weight[:, None] * level.to(tl.int32)
    rounded = (sums + (1 << (shift - 1))) >> shift
    levels = tl.minimum(tl.maximum(rounded, 0), 255)
    column = tl.where(tl.load(entry + 5) != 0, size - 1 - x, x)
    line = (tl.load(entry + 6) * 3 + plane % 3) * size + y
    mask = (y < size)[:, None] & (x < size)[None, :]
    tl.store(resized + line[:, None] * size + column[None, :], levels.to(tl.uint8), mask=mask)
