"""Count the FLOPs of one image at a bandwidth, on the meta device."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mae_et.curriculum.mae_cost import FORWARD_AND_BACKWARD


def training_flops(
    forward: Callable[[Tensor], object],
    channels: int = 3,
    sides: Callable[[int], tuple[int, int]] = lambda bandwidth: (bandwidth, bandwidth),
) -> Callable[[int], float]:
    """Return a function from a bandwidth to the FLOPs of one image's training step.

    A multiply-add counts as two FLOPs, and the backward pass as twice the forward pass. `forward`
    takes images [B C H W] on the meta device, and `sides` maps a bandwidth to H and W.
    """

    @cache
    def flops(bandwidth: int) -> float:
        images = torch.empty(1, channels, *sides(bandwidth), device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward(images)
        return float(FORWARD_AND_BACKWARD * counter.get_total_flops())

    return flops
