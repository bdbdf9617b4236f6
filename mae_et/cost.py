"""What an image costs at a bandwidth: FLOPs, counted on the meta device without computing."""

from collections.abc import Callable
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_et.model import MaskedAutoencoder

# A backward pass computes two products for each one of the forward pass.
FORWARD_AND_BACKWARD = 3


def training_flops(
    model: MaskedAutoencoder, channels: int = 3, mask_ratio: float = 0.75
) -> Callable[[int], float]:
    """Return a function from a bandwidth to the FLOPs of one image's training step.

    Args:
        model: a masked autoencoder on the meta device.
        channels: channels of its images.
        mask_ratio: share of hidden patches.
    """

    @cache
    def flops(bandwidth: int) -> float:
        images = torch.empty(1, channels, bandwidth, bandwidth, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images, mask_ratio)
        return float(FORWARD_AND_BACKWARD * counter.get_total_flops())

    return flops
