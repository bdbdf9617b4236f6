"""Features and labels that belong together."""

import torch
from torch import Tensor


def check_features(features: Tensor, labels: Tensor, name: str) -> None:
    """Check that features [N D] and labels [N] belong together.

    Raises:
        ValueError: shapes or types do not fit, there are no images, or a label is negative.
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
    if int(labels.min()) < 0:
        raise ValueError(f"{name} has an unlabelled image (label {int(labels.min())})")
