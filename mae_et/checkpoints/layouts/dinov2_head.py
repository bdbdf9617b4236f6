"""The head of DINOv2's classifiers, linear in the class token and the mean of the patches."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mae_et.checkpoints.weights import Weights


def has_dinov2_head(weights: Weights) -> bool:
    """Return whether a head takes features of twice the encoder's width."""
    weight = weights.head.get("weight")
    width = weights.encoder["pos_embed"].shape[-1]
    return weight is not None and tuple(weight.shape[1:]) == (2 * width,)


def add_dinov2_head(network: Any) -> None:
    """Give such a head to a timm ViT with class token, in place."""
    network.pool = partial(_pool, prefix=network.num_prefix_tokens)
    network.head = nn.Linear(2 * network.embed_dim, network.num_classes)


def _pool(tokens: Tensor, pool_type: str | None = None, *, prefix: int) -> Tensor:
    """[B P+N W] -> [B 2W]; registers are not patches, as in transformers."""
    return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(dim=1)], dim=1)
