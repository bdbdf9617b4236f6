"""Features with their labels."""

import math

import torch
from torch import Tensor

Labelled = tuple[Tensor, Tensor]
"""Features, float [N D], and their labels, int64 [N] from 0."""


def check_splits(train: Labelled, val: Labelled) -> None:
    """Check training and validation features, and that they have one width and type."""
    check_features(*train, "train")
    check_features(*val, "val")
    ours, theirs = ((each.shape[1], each.dtype) for each, _ in (train, val))
    if ours != theirs:
        raise ValueError(
            f"train and val must have features of one width and type, got {ours[0]} of {ours[1]} "
            f"and {theirs[0]} of {theirs[1]}"
        )


def check_features(features: Tensor, labels: Tensor, name: str) -> None:
    """Check features [N D] and their labels [N].

    Raises:
        ValueError: shapes or types do not fit, there are no images, a feature is not finite, or a
            label is negative.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        raise ValueError(
            f"{name} must be features [N D] and labels [N] with N > 0, got shapes "
            f"{list(features.shape)} and {list(labels.shape)}"
        )
    if not features.is_floating_point() or labels.dtype != torch.int64:
        raise ValueError(
            f"{name} must be floating-point features and int64 labels, got {features.dtype} and "
            f"{labels.dtype}"
        )
    if not all(value.isfinite() for value in features.aminmax()):  # no copy, unlike isfinite
        raise ValueError(f"{name} has features that are not finite")
    if int(labels.min()) < 0:
        raise ValueError(f"{name} has an unlabelled image (label {int(labels.min())})")


def at_least_float32(features: Tensor) -> Tensor:
    """Return half-precision features in float32, and others as they are.

    Half precision rounds small epsilons to zero, and large norms to infinity.
    """
    return features.to(torch.promote_types(features.dtype, torch.float32))


def scale_of(features: Tensor) -> float:
    """Return the power of two to divide features by, so that their squares are in range.

    It is 1 for features of an ordinary scale, which need no copy then.
    """
    limits = torch.finfo(features.dtype)
    largest = max(abs(value.item()) for value in features.aminmax())
    if largest == 0 or 2**-10 < largest < limits.max**0.25:
        return 1.0
    return 2.0 ** (math.frexp(max(largest, limits.tiny))[1] - 1)
