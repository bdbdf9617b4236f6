"""Model the images/s of one of several GPUs by the images of its step.

A step of few images is bound by launching kernels, and on several GPUs it exchanges gradients: the
speed measured with many images on one GPU is not that of one among 64.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mae_et.curriculum.plan import Plan
from mae_et.errors import UserError


@dataclass(frozen=True)
class GpuSpeed:
    """Measured speeds of a GPU, and those that follow for a number of GPUs."""

    passes: Mapping[int, Mapping[int, float]]
    """Images/s of training by bandwidth and images of a micro-batch: one size, or several."""
    decoded: Mapping[int, float] | None = None
    """Images/s that a GPU decodes beside training, by bandwidth, if it decodes."""
    exchange: Mapping[str, Any] | None = None
    """Measured exchange of gradients (`exchange_seconds`)."""

    def __post_init__(self) -> None:
        for sizes in self.passes.values():
            numbers = (*sizes, *sizes.values())
            if not numbers or not all(0 < number < math.inf for number in numbers):
                raise UserError(f"--throughput must be positive images/s, got {self.passes}")

    def trained(self, images: int) -> dict[int, float]:
        """Return the images/s of training alone by bandwidth, for steps of `images`."""
        return {b: speed_of_step(measured, images) for b, measured in self.passes.items()}

    def among(self, gpus: int, plan: Plan) -> dict[int, float]:
        """Return the images/s of one of several GPUs by bandwidth, its exchange included."""
        images = max(1, plan.batch_size // gpus)
        seconds = exchange_seconds(self.exchange, gpus)
        decoded = self.decoded or {}
        return {
            b: images / (images / min(speed, decoded.get(b, math.inf)) + seconds)
            for b, speed in self.trained(images).items()
        }


def speed_of_step(measured: Mapping[int, float], images: int) -> float:
    """Return the images/s of steps of `images`, from images/s by images of a micro-batch.

    The time of a micro-batch is modelled as a constant (launching kernels) plus a time per image,
    fitted to the least and the greatest measured size. With one size, and for steps of at least the
    greatest, it is proportional to the number of images.
    """
    small, large = min(measured), max(measured)
    if images >= large or small == large:
        return measured[large]
    less, more = small / measured[small], large / measured[large]
    each = max(0.0, (more - less) / (large - small))
    return images / (more - each * (large - images))


def exchange_seconds(found: Mapping[str, Any] | None, gpus: int) -> float:
    """Return the time of an all-reduce at the measured bus speed; 0 if it was not measured."""
    if found is None or "error" in found:
        return 0.0
    return float(2 * (gpus - 1) / gpus * found["bytes"] / found["bus_bytes_per_second"])
