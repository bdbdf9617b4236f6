"""Labelled features for probes: Gaussian clouds around fixed centres."""

import torch

from finetune import Features


def clouds(count: int, seed: int, spread: float = 1.0) -> Features:
    """Gaussian clouds around four fixed centres, in 8 dimensions."""
    centres = 3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    noise = spread * torch.randn(count, 8, generator=generator)
    return Features(centres[labels] + noise, labels)


def separable(count: int) -> Features:
    """One-dimensional features of two classes, alternating and far apart."""
    labels = torch.arange(count) % 2
    return Features((6.0 * labels - 3)[:, None], labels)
