"""Training cost of one image at each bandwidth: FLOPs of the network, or pixels."""

import math
from collections.abc import Callable

from torch import Tensor

from finetune.image_size import Size, size_at_bandwidth
from mae_et.curriculum.flops import training_flops


def image_cost(
    size: Size, patch: int, forward: Callable[[Tensor], object] | None, channels: int
) -> Callable[[int], float]:
    """Return a function from a bandwidth to the cost of one image.

    Args:
        size: base size.
        patch: side of a patch, in pixels.
        forward: network on the meta device, to count FLOPs; None counts pixels.
        channels: image channels.
    """
    if forward is None:
        return lambda bandwidth: float(math.prod(size_at_bandwidth(size, bandwidth, patch)))
    return training_flops(
        forward, channels, lambda bandwidth: size_at_bandwidth(size, bandwidth, patch)
    )
