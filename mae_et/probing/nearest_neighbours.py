"""Weighted k-nearest-neighbour accuracy of features.

Votes are weighted by exp(cosine / temperature), as in Wu et al. (CVPR 2018, arXiv 1805.01978).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.probing.labelled import at_least_float32, check_splits, scale_of

MAX_SIMILARITIES = 2**28
"""Maximum entries of a block of the similarity matrix: 1 GiB in float32."""


def knn_accuracy(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Classify features by their nearest neighbours, and return the top-1 accuracy.

    Runs on the features' device, on blocks of the similarity matrix of at most 1 GiB; further
    memory, besides the features, is O(N), and a copy of features of an extreme scale or in half
    precision, which are computed with in float32.

    Args:
        train: features that vote, float [N D], and their labels, int64 [N] from 0.
        val: features to classify, float [M D], and their labels, int64 [M].
        neighbours: number of neighbours that vote (k); all N if N is smaller.
        temperature: temperature of the votes' weights, exp(cosine / temperature).

    Returns:
        Top-1 accuracy in percent, 0 to 100.

    Raises:
        ValueError: shapes or types do not fit; a split is empty, or has unlabelled images or
            features that are not finite; or neighbours or temperature are not positive.

    Source: InstDisc (Wu et al., CVPR 2018, arXiv 1805.01978), with DINO's k and temperature.
    """
    (bank, bank_labels), (queries, labels) = train, val
    check_splits(train, val)
    if neighbours < 1 or temperature <= 0:
        raise ValueError(
            f"neighbours and temperature must be positive, got {neighbours} and {temperature}"
        )
    bank, queries = map(at_least_float32, (bank, queries))
    bank, queries = (
        part if (scale := scale_of(part)) == 1 else part / scale for part in (bank, queries)
    )
    k = min(neighbours, len(bank))
    classes = int(bank_labels.max()) + 1
    # Norms instead of a normalised copy: ImageNet's features take gigabytes.
    inverse_norm = 1 / bank.norm(dim=1).clamp_min(1e-12)
    block = max(1, min(1024, MAX_SIMILARITIES // len(bank)))
    correct = 0
    for vectors, truth in zip(queries.split(block), labels.split(block), strict=True):
        similarity = F.normalize(vectors, dim=1) @ bank.T
        cosine, nearest = similarity.mul_(inverse_norm).topk(k, dim=1)
        votes = torch.zeros(len(vectors), classes, device=vectors.device, dtype=cosine.dtype)
        # Relative to the nearest neighbour: the same ratios, and no overflow.
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        votes.scatter_add_(1, bank_labels[nearest], weights)
        correct += int((votes.argmax(dim=1) == truth).sum())
    return 100 * correct / len(labels)
