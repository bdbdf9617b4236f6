"""Features of images from a frozen vision transformer.

Shapes: B batch, C channels, H W image size, P prefix tokens, N patches, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mae_et.config.model import Pool
from mae_et.errors import UserError, require, require_choice


@torch.no_grad()
def extract_features(model: nn.Module, images: Tensor, pool: Pool = "mean") -> Tensor:
    """Return one feature vector for each image.

    Args:
        model: timm vision transformer (`mae_et.load_encoder`), in evaluation mode.
        images: float [B C H W], normalised with the statistics the model was trained with, on the
            model's device and at its image size.
        pool: `mean` of the patch tokens, or the class token (`cls`).

    Returns:
        [B D], on the model's device; equal to timm's `forward_head(..., pre_logits=True)` if `pool`
        is the model's own pooling.

    Raises:
        UserError: the model is not a timm model, pool is unknown, or pool is cls and the model has
            no class token.
    """
    network: Any = model
    kind = type(model).__name__
    require(hasattr(model, "forward_features"), f"model must be a timm model, got a {kind}")
    return pool_tokens(network, network.forward_features(images), pool)


def pool_tokens(model: nn.Module, tokens: Tensor, pool: Pool) -> Tensor:
    """[B P+N D] tokens of a timm vision transformer -> [B D].

    A norm after pooling (`fc_norm`) is applied if the model was trained with this pooling.
    """
    network: Any = model
    require_choice(pool, Pool, "pool")
    if tokens.ndim != 3:
        raise UserError(f"the features of a {type(model).__name__} are maps, not lists of tokens")
    if pool == "cls" and getattr(network, "cls_token", None) is None:
        raise UserError("pool cls needs a class token, and this encoder has none: use pool mean")
    pooled = tokens[:, 0] if pool == "cls" else tokens[:, network.num_prefix_tokens :].mean(dim=1)
    own = {"avg": "mean", "token": "cls"}.get(getattr(network, "global_pool", ""))
    return network.fc_norm(pooled) if own == pool and hasattr(network, "fc_norm") else pooled
