"""What an image costs at a bandwidth: FLOPs, counted on the meta device without computing."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

# A backward pass computes two products for each one of the forward pass.
FORWARD_AND_BACKWARD = 3


def training_flops(
    forward: Callable[[Tensor], object],
    channels: int = 3,
    sides: Callable[[int], tuple[int, int]] = lambda bandwidth: (bandwidth, bandwidth),
) -> Callable[[int], float]:
    """Return a function from a bandwidth to the FLOPs of one image's training step.

    Args:
        forward: runs a network on the meta device on images [B C H W].
        channels: C.
        sides: from a bandwidth to height and width of the images; a square by default.
    """

    @cache
    def flops(bandwidth: int) -> float:
        images = torch.empty(1, channels, *sides(bandwidth), device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward(images)
        return float(FORWARD_AND_BACKWARD * counter.get_total_flops())

    return flops
