"""Effective rank of features: how many directions they span; needs no labels."""

import torch
from torch import Tensor

EPSILON = 1e-7
"""Added to each normalised singular value, as in RankMe for float32."""


def effective_rank(features: Tensor) -> float:
    """Return RankMe, the exponential of the entropy of the normalised singular values.

    It falls when features collapse onto few directions. It correlates with accuracy among trained
    encoders that differ in hyper-parameters, not across datasets or architectures, and it depends
    on N unless N is many times D.

    Args:
        features: float [N D], not centred.

    Returns:
        Between 1 and min(N, D), up to epsilon; also 1 if all features are zero.

    Source: RankMe (Garrido et al., ICML 2023, arXiv 2210.02885), equations 1 and 2:
    exp(-sum_k p_k log p_k) with p_k = sigma_k / ||sigma||_1 + 1e-7.
    """
    sigma = torch.linalg.svdvals(features.float())
    total = sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)
    share = sigma / total + EPSILON
    return (-(share * share.log()).sum()).exp().item()
