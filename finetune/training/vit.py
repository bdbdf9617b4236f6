"""Build a timm ViT around a checkpoint's encoder, with a new head or the checkpoint's own.

Sources: MAE's fine-tuning and linear probe (arXiv 2111.06377, FINETUNE.md): mean pooling with a new
norm (`fc_norm`) and a head initialised near zero, or the class token; a BatchNorm without affine
before the head of a linear probe.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed, resample_patch_embed, trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from finetune.config import NetworkConfig
from finetune.image_size import check_tiles, height_and_width
from mae_et.checkpoints.encoders import create_vit_of
from mae_et.checkpoints.layouts.mae import PROBE_EPSILON, head_entries
from mae_et.checkpoints.state_dicts import describe_mismatch
from mae_et.checkpoints.weights import Weights
from mae_et.errors import UserError
from mae_et.runtime.console import notify

POOLS = {"mean": "avg", "cls": "token"}
HEAD_STD = {"none": 2e-5, "linear": 0.01, "attentive": 0.01}


def build_vit(config: NetworkConfig, weights: Weights, classes: int) -> VisionTransformer:
    """Build a config's ViT with a checkpoint's encoder, and its head if it fits (`keeps_head`).

    Position embeddings are resampled to the image size (bicubic, antialiased), and the patch
    embedding to another patch size, both by timm's functions. A probe's encoder is frozen.

    Raises:
        UserError: sizes do not fit, or tensors are missing or unexpected; the sentence lists them.
    """
    weights = weights.with_given(config.encoder_num_heads)
    kernel = weights.encoder["patch_embed.proj.weight"]
    if kernel.shape[1] != config.channels:
        raise UserError(
            f"model.channels {config.channels}: the encoder of {weights.path} has {kernel.shape[1]}"
        )
    patch = config.patch_size or kernel.shape[-1]
    check_tiles(config.image_size, patch, "model.image_size")
    grid = [side // patch for side in height_and_width(config.image_size)]
    encoder = weights.encoder | {"pos_embed": _resample_positions(weights, grid)}
    if patch != kernel.shape[-1]:
        encoder["patch_embed.proj.weight"] = resample_patch_embed(kernel, [patch, patch])
    network, encoder = create_vit_of(
        replace(weights, encoder=encoder, grid=grid),
        num_classes=classes,
        global_pool="map" if config.probe == "attentive" else POOLS[config.pool],
        fc_norm=None,  # timm's default for the pooling
        final_norm=True,
        drop_rate=config.head_dropout,
        drop_path_rate=config.drop_path,
        dynamic_img_size=True,  # for a curriculum's smaller stages
    )
    linear: Any = network.head
    if config.probe == "linear":
        norm = nn.BatchNorm1d(network.embed_dim, affine=False, eps=PROBE_EPSILON)
        linear = nn.Linear(network.embed_dim, classes)
        network.head = nn.Sequential(norm, linear)  # type: ignore[assignment]
    trunc_normal_(linear.weight, std=HEAD_STD[config.probe])
    nn.init.zeros_(linear.bias)
    _load_encoder(network, encoder, weights.path)
    if keeps_head(network, weights):
        network.load_state_dict(head_entries(weights.head), strict=False)
    if config.probe != "none":
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(("head.", "attn_pool.")))
    return network


def keeps_head(network: Any, weights: Weights) -> bool:
    """Return whether a checkpoint's head fits: same number of classes, same pooling."""
    head, encoder = weights.head, weights.encoder
    pools = {"attn_pool.latent": "map", "fc_norm.weight": "avg", "cls_token": "token"}
    own = next((pool for name, pool in pools.items() if name in encoder), None)
    is_probe = isinstance(network.head, nn.Sequential)
    return (
        {"weight", "bias"} <= set(head)
        and head["weight"].shape == (network.num_classes, network.embed_dim)
        and is_probe == ("running_mean" in head)
        and (is_probe or network.global_pool == own)  # a probe's weights do not show its feature
    )


def _resample_positions(weights: Weights, grid: list[int]) -> Tensor:
    """Resample position embeddings to a grid.

    If the file does not record their grid, it is assumed to be square, or else `grid`.
    """
    table = weights.encoder["pos_embed"]
    extra = {"reg_token", "register_tokens"} & weights.encoder.keys()
    if extra or "cls_token" not in weights.encoder:
        raise UserError(
            f"{weights.path} has {'registers' if extra else 'no class token'}: fine-tune its timm "
            "model with --model.backbone"
        )
    count = table.shape[1] - 1
    side = math.isqrt(max(count, 0))
    own = [side, side]
    if weights.grid is not None:
        own = list(weights.grid)
    elif side * side != count:
        own = grid
    if math.prod(own) != count:
        raise UserError(
            f"{weights.path} has {count} positions, which fit neither a square grid nor "
            f"{grid[0]} x {grid[1]} patches (model.image_size)"
        )
    if own == grid:
        return table
    notify(
        f"positions of {weights.path} are resampled from {own[0]} x {own[1]} to {grid[0]} x "
        f"{grid[1]} patches"
    )
    return resample_abs_pos_embed(table, grid, own, num_prefix_tokens=1)


def _load_encoder(network: nn.Module, encoder: dict[str, Tensor], path: Path) -> None:
    """Load an encoder; only the head and the final norm of a different pooling may differ."""
    # Only mean pooling has a new norm; otherwise the encoder's own must be present.
    new, unused = ("head.", "fc_norm.", "attn_pool."), ("norm.", "fc_norm.")
    mismatch = describe_mismatch(encoder, network.state_dict(), may_lack=new, may_have=unused)
    if mismatch:
        raise UserError(f"{path} does not fit: {mismatch}")
    network.load_state_dict(encoder, strict=False)
