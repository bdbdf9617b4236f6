"""Micro-batches on their way to the device."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import default_collate

from mae_et.config.model import ModelConfig
from mae_et.curriculum.plan import PlannedStage

NOT_REPLACED = torch.tensor((-1, -1, -1))


class Batch(NamedTuple):
    """A micro-batch of pre-training."""

    images: Tensor
    """uint8 [B C H W], or float32 for arrays that are not uint8: at the base size, or at the
    stage's bandwidth with crop.method decode."""
    noise: Tensor
    """float32 [B N]: noise of the mask, on the stage's grid."""
    stage: Tensor
    """int64 [B]: index of the plan's stage, the same for all images of a micro-batch."""
    replaced: Tensor = NOT_REPLACED
    """int64 [B 3]: sample index of each image that could not be read and was replaced; else -1."""


AnyBatch = TypeVar("AnyBatch", bound=Any)
"""A NamedTuple with `images`, `stage` and `replaced`: `Batch` or another kind of run's."""


def collate(samples: Sequence[Any]) -> Any:
    """Stack samples (tuples of an image and more) field by field, as torch's default does."""
    kind: Any = type(samples[0])
    images, *rest = zip(*samples, strict=True)
    fields = [default_collate(in_one_dtype(images)), *(default_collate([*each]) for each in rest)]
    return kind._make(fields) if hasattr(kind, "_make") else fields


def in_one_dtype(images: Sequence[Tensor]) -> list[Tensor]:
    """Return images that can be stacked: if some are float32, uint8 ones become float32 in [0, 1].

    Stacking alone would convert 0 to 255 unscaled, and `normalise` would no longer scale them.
    """
    if len({image.dtype for image in images}) == 1:
        return list(images)
    return [image / 255 if image.dtype == torch.uint8 else image for image in images]


def black_batch(model: ModelConfig, stage: PlannedStage, count: int) -> Batch:
    """Return `count` black images at the base size, as a micro-batch of a stage."""
    images = torch.zeros(count, model.channels, *[model.image_size] * 2, dtype=torch.uint8)
    noise = torch.zeros(count, (stage.bandwidth // model.patch) ** 2)
    return Batch(images, noise, torch.full((count,), stage.index))
