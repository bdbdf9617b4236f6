"""Resize one box of each of many images at once, by two batched matrix products.

On a GPU where Triton can compile, `box_resize_triton` computes the same in less time.

The antialiased bicubic filter of torchvision is separable: `rows @ box @ columns.T` is the resized
box. The boxes of a group lie in one canvas, padded with zeros.

The result does not depend on the other images of a batch, the order of summation, TF32 or the
device: pixels, and weights in units of 2^-13, are whole numbers, and every sum in a product is a
whole number below 2^24, which is exact in float32. For TF32, whose operands have 11 bits, weights
are the sum of two parts of 7 and 6 bits, and the image between the two products is rounded to
quarters of a level (and not clamped; Pillow rounds it to levels and clamps it).

Shapes: N images, C channels, S side of the result, H and W the canvas, T taps of the filter.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mae_et.data.images.boxes import PixelBox

ONE = 2**13
"""A weight of one, in units of 2^-13."""
COARSE = 2**6
QUARTERS = 4
"""Steps per level of the image between the two products."""
MAX_NUMBERS = 2**25
"""Maximum numbers in a canvas, unless one image has more: 128 MiB in float32."""

Resize = Callable[[Sequence[Tensor], Sequence[PixelBox], Sequence[bool], int], Tensor]
"""`resize_boxes` or an equivalent function."""


def resize_boxes(
    images: Sequence[Tensor], boxes: Sequence[PixelBox], flips: Sequence[bool], size: int
) -> Tensor:
    """Resize a box of each image, uint8 [C H W], to a square, and flip some of them horizontally.

    Within 1 of 255 levels of torchvision's `resized_crop` (bicubic, antialias) on uint8. All images
    are on one device, and so is the result, uint8 [N C S S].
    """
    channels, device = images[0].shape[0], images[0].device
    resized = torch.empty(len(images), channels, size, size, dtype=torch.uint8, device=device)
    for group in groups_of_boxes(boxes, lambda side: channels * max(size, side) ** 2, MAX_NUMBERS):
        height, width = max(boxes[i][2] for i in group), max(boxes[i][3] for i in group)
        canvas = torch.zeros(len(group), channels, height, width, device=device)
        places = [canvas[n, :, : boxes[i][2], : boxes[i][3]] for n, i in enumerate(group)]
        # A single call, which releases the GIL for the training thread.
        torch._foreach_copy_(places, [_cut(images[i], boxes[i]) for i in group])
        columns = filter_weights([boxes[i][3] for i in group], size, width, device)[:, None]
        rows = filter_weights([boxes[i][2] for i in group], size, height, device)[:, None]
        coarse, fine = _parts(columns.mT)  # [N 1 W S]
        narrow = _round((canvas @ coarse).add_(canvas @ fine), ONE // QUARTERS)  # [N C H S]
        coarse, fine = _parts(rows)  # [N 1 S H]
        square = _round((coarse @ narrow).add_(fine @ narrow), ONE * QUARTERS)  # [N C S S]
        resized[torch.tensor(group, device=device)] = square.clamp_(0, 255).to(torch.uint8)
    flipped = torch.tensor(flips, device=device)[:, None, None, None]
    return torch.where(flipped, resized.flip(-1), resized)


def filter_weights(
    sides: Sequence[int], size: int, length: int, device: torch.device | None = None
) -> Tensor:
    """Return the antialiased bicubic filter (a = -0.5) of boxes along one axis, in units of 1/ONE.

    Boxes of N sides in a canvas of `length` L are resized to `size` S. The weights are whole
    numbers, float32 [N S L]; each row sums to `ONE`.
    """
    first, weights = filter_taps(torch.tensor(sides, device=device), size, max(sides))
    places = first[..., None] + torch.arange(weights.shape[-1], device=device)
    filters = torch.zeros(len(sides), size, length, device=device)
    return filters.scatter_add_(-1, places.clamp(max=length - 1), weights.float())


def filter_taps(sides: Tensor, size: int, longest: int) -> tuple[Tensor, Tensor]:
    """Return only the taps of `filter_weights`, for sides int64 [N] whose maximum the host knows.

    Returns:
        The first pixel of each output, int64 [N S], and the weights of the T pixels from there,
        whole numbers in float64 [N S T]; those of pixels beyond the box are zero.
    """
    side = sides.double()[:, None]
    scale = side / size  # [N 1]
    stretch = scale.clamp(min=1)
    centre = (torch.arange(size, dtype=torch.float64, device=sides.device) + 0.5) * scale  # [N S]
    first = (centre - 2 * stretch + 0.5).floor().clamp(min=0)
    last = torch.minimum((centre + 2 * stretch + 0.5).floor(), side)
    taps = math.ceil(4 * max(1.0, longest / size)) + 1
    places = first[..., None] + torch.arange(taps, device=sides.device)  # [N S T]
    distance = ((places + 0.5 - centre[..., None]) / stretch[..., None]).abs()
    weights = _bicubic(distance) * (places < last[..., None])
    whole = (weights * (ONE / weights.sum(-1, keepdim=True))).round()
    # The largest weight absorbs the rounding error, so that constant images stay constant.
    largest = whole.argmax(-1, keepdim=True)
    return first.long(), whole.scatter_add_(-1, largest, ONE - whole.sum(-1, keepdim=True))


def _cut(image: Tensor, box: PixelBox) -> Tensor:
    top, left, height, width = box
    return image[:, top : top + height, left : left + width]


def _bicubic(distance: Tensor) -> Tensor:
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0))


def _parts(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights as a sum of multiples of `COARSE` (7 bits) and remainders (6 bits)."""
    coarse = (weights / COARSE).round_() * COARSE
    return coarse, weights - coarse


def _round(sums: Tensor, unit: int) -> Tensor:
    """Divide sums by a unit and round to whole numbers, halves up, in place."""
    return sums.add_(unit // 2).div_(unit).floor_()


def groups_of_boxes(
    boxes: Sequence[PixelBox], numbers: Callable[[int], int], most: int
) -> Iterator[list[int]]:
    """Yield the indices of boxes of similar length, in groups that take at most `most` numbers.

    `numbers` maps the longest side of a group to the numbers that each of its images takes.
    """
    group: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: max(boxes[i][2:])):
        if group and (len(group) + 1) * numbers(max(boxes[i][2:])) > most:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
