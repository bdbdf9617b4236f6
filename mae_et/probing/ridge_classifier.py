"""A linear probe in closed form: ridge regression of classes on features.

Shapes: N and M images, D width, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.probing.labelled import at_least_float32, check_splits, scale_of

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidate penalties for standardised features, relative to the number of images."""


def ridge_accuracy(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> float:
    """Fit a linear classifier to features in closed form, and return its top-1 accuracy.

    One-hot classes are regressed on standardised features with an intercept. The penalty is the
    candidate with the best leave-one-out accuracy on the training images; one eigendecomposition
    serves all candidates. No random numbers are drawn.

    Args:
        train: features to fit, float [N D], and their labels, int64 [N] from 0.
        val: features to classify, float [M D], and their labels, int64 [M].

    Returns:
        Top-1 accuracy in percent, 0 to 100.

    Raises:
        ValueError: shapes or types do not fit, or a split is empty or has unlabelled images or
            features that are not finite.

    Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 2nd edition,
    sections 3.4.1 (ridge regression) and 7.10 (leave-one-out residuals of linear fits).
    """
    (features, labels), (queries, truth) = train, val
    check_splits(train, val)
    features, queries = map(at_least_float32, (features, queries))
    scale = scale_of(features)
    features, queries = features / scale, queries / scale
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-6)
    x = (features - mean) / std
    classes = F.one_hot(labels).to(x)  # [N C]
    frequency = classes.mean(dim=0)
    count = len(x)
    variances, directions = torch.linalg.eigh(x.T @ x / count)  # [D], [D D]
    variances.clamp_(min=0)  # rounding can make those of dependent features negative
    x = x @ directions  # uncorrelated, so that each direction is penalised alone
    covariance = x.T @ (classes - frequency) / count  # [D C]

    def weights(ridge: float) -> Tensor:
        return covariance / (variances + ridge)[:, None]

    def leave_one_out(ridge: float) -> float:
        leverage = ((x.square() / (variances + ridge)).sum(dim=1) + 1) / count  # 1: the intercept
        fitted = x @ weights(ridge) + frequency
        # Times 1 - leverage > 0, which changes no maximum.
        without = fitted - leverage[:, None] * classes
        return (without.argmax(dim=1) == labels).float().mean().item()

    best = weights(max(RIDGES, key=leave_one_out))
    scores = ((queries - mean) / std) @ directions @ best + frequency
    return 100 * int((scores.argmax(dim=1) == truth).sum()) / len(truth)
