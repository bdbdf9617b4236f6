"""Weighted k-nearest neighbours: how far labels follow from the features alone.

Votes are weighted by exp(cosine / temperature), as in Wu et al. (CVPR 2018, arXiv 1805.01978).
"""

import torch
import torch.nn.functional as F

from finetune.features import Features

CHUNK = 1024


def knn_accuracy(
    train: Features, val: Features, neighbours: int = 20, temperature: float = 0.07
) -> float:
    """Return the share of validation images, in percent, that their neighbours' votes get right.

    It is computed where the features are.

    Args:
        train: features that vote.
        val: features that are judged.
        neighbours: how many of the nearest vote; all where there are fewer.
        temperature: of the votes' weights.
    """
    bank = F.normalize(train.vectors, dim=1)
    k = min(neighbours, len(bank))
    right = 0
    for vectors, labels in zip(
        F.normalize(val.vectors, dim=1).split(CHUNK), val.labels.split(CHUNK), strict=True
    ):
        cosine, nearest = (vectors @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(vectors), train.classes, device=vectors.device)
        # Relative to the nearest: the votes' ratios are the same and none overflows.
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        votes.scatter_add_(1, train.labels[nearest], weights)
        right += int((votes.argmax(dim=1) == labels).sum())
    return 100 * right / len(val.labels)
