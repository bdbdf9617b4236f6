"""Sizes of images: a side in pixels, or height and width, and what a curriculum makes of them."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # configs import this module, and need no PyTorch
    from torch import Tensor

Size = int | tuple[int, int]


def height_and_width(size: Size) -> tuple[int, int]:
    """Return height and width in pixels."""
    return (size, size) if isinstance(size, int) else size


def shorter_side(size: Size) -> int:
    """Return the side that a curriculum's bandwidths are of: the shorter one."""
    return min(height_and_width(size))


def size_at_bandwidth(size: Size, bandwidth: int, patch: int) -> tuple[int, int]:
    """Return height and width at a bandwidth, which is that of the shorter side.

    The longer side keeps its ratio to it, rounded *up* to a multiple of the patch, as bandwidths of
    presets are: never less spectrum than asked for. At the full bandwidth it is the size itself.

    Args:
        size: the base size, of multiples of the patch.
        bandwidth: a multiple of the patch, at most the shorter side.
        patch: side of a patch, in pixels.
    """
    height, width = (
        -(-side * bandwidth // (shorter_side(size) * patch)) * patch
        for side in height_and_width(size)
    )
    return height, width


def image_cost(
    size: Size, patch: int, forward: "Callable[[Tensor], object] | None", channels: int
) -> Callable[[int], float]:
    """Return a function from a bandwidth to the cost of an image: FLOPs, or pixels.

    Args:
        size: the base size.
        patch: side of a patch, in pixels.
        forward: runs a network on the meta device, for FLOPs; None counts pixels.
        channels: channels of the images.
    """
    if forward is None:
        return lambda bandwidth: float(math.prod(size_at_bandwidth(size, bandwidth, patch)))
    from mae_et.curriculum.flops import training_flops

    return training_flops(
        forward, channels, lambda bandwidth: size_at_bandwidth(size, bandwidth, patch)
    )


def format_size(size: Size) -> str:
    """Return a size as a sentence tells it: 224, or 96 x 128."""
    height, width = height_and_width(size)
    return str(height) if height == width else f"{height} x {width}"
