"""Create the encoder: a plain timm VisionTransformer."""

import inspect
import re
import warnings
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.tensor import DTensor

from mae_et.config.model_names import suggest_model
from mae_et.errors import UserError, listed, one_line
from mae_et.models.pos_embed import Grid, sincos_positions

LOADING = set(inspect.signature(timm.create_model).parameters)
"""Arguments by which timm chooses, finds or compiles a model, rather than the model's own."""


def build_plain_vit(
    name: str, image_size: int | tuple[int, int], channels: int, **overrides: int | None
) -> VisionTransformer:
    """Create a timm VisionTransformer with one class token and no parts that masking would skip.

    `overrides` are settings of the architecture; None keeps the default.

    Raises:
        UserError: timm does not know the model, it is not a plain ViT, or its width is not a
            multiple of 4.
    """
    encoder = create_vit(
        name, num_classes=0, global_pool="token", img_size=image_size, in_chans=channels,
        **overrides,  # timm drops those that are None
    )  # fmt: skip
    if not isinstance(encoder, VisionTransformer) or not _is_plain(encoder):
        raise UserError(
            f"model.encoder {name!r} is not a plain VisionTransformer with one class token, which "
            "masked autoencoding needs (vit_small_patch16_224, vit_base_patch16_224, ...)"
        )
    if encoder.embed_dim % 4:
        raise UserError(f"the encoder width must be a multiple of 4, got {encoder.embed_dim}")
    return encoder


def create_vit(name: str, /, **settings: Any) -> Any:
    """Create a timm model, overriding its defaults with `settings`.

    Raises:
        UserError: timm does not know the model, or the model does not accept the settings.
    """
    check_settings_of(name, settings)
    try:
        return timm.create_model(name, **settings)
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError,
        TypeError, ValueError,
    ) as error:  # fmt: skip
        if keyword := re.search(r"unexpected keyword argument (\S+)", str(error)):
            raise UserError(
                f"timm's {name!r} is not a plain vision transformer: it takes no {keyword[1]}"
            ) from error
        raise UserError(f"timm cannot build the encoder {name!r}: {one_line(error)}") from error


def check_settings_of(name: str, settings: dict[str, Any]) -> None:
    """Refuse a name and settings from a file with which timm would read other files.

    Raises:
        UserError: timm does not know the model, or a setting is not the model's own.
    """
    if not timm.is_model(name):  # otherwise timm might look up a name from a file on a hub
        raise UserError(
            f"timm cannot build the encoder {name!r}: there is no model of this name"
            f"{suggest_model(name, 'patch')}"
        )
    if reserved := settings.keys() & LOADING:  # checkpoint_path, pretrained
        raise UserError(
            f"timm cannot build {name!r}: {listed(sorted(reserved))} is not a setting of the model"
        )


def set_norm_eps(network: nn.Module, eps: float | None) -> None:
    """Set the epsilon of every layer norm of a network; None keeps its own."""
    for part in network.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = eps or part.eps


def heads_of_vit(name: str, width: int, settings: dict[str, Any]) -> int | None:
    """Return the number of heads of timm's plain ViT of a name and width; None if there is none."""
    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        network = create_vit(name, **settings)
    plain = isinstance(network, VisionTransformer) and network.embed_dim == width
    return int(network.blocks[0].attn.num_heads) if plain else None


def warn_of_other_positions(
    grid: Grid, extent: Grid, encoder: Any, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Warn before a masked autoencoder's encoder loads positions that `encode` would not use.

    A hook for `register_load_state_dict_pre_hook`; `grid` is laid over `extent`.
    """
    given = state_dict.get(f"{prefix}pos_embed")
    if given is None or given.shape != encoder.pos_embed.shape or isinstance(given, DTensor):
        return  # missing, refused by PyTorch, or sharded: a run's own
    table = sincos_positions(grid, extent, given.shape[-1], given.device)
    if not given.is_meta and (given[0, 1:] - table).abs().max() > 0.01:  # more than of rounding
        warnings.warn(
            "the positions loaded (pos_embed) are not MAE's fixed sine-cosine table, which "
            "MaskedAutoencoder.encode computes whatever is loaded; forward_features uses them",
            stacklevel=1,
        )


def _is_plain(encoder: VisionTransformer) -> bool:
    """Return whether `MaskedAutoencoder.encode` runs every part of the encoder."""
    return (
        isinstance(encoder.patch_embed, PatchEmbed)
        and encoder.num_prefix_tokens == 1
        and encoder.cls_token is not None
        and encoder.pos_embed is not None
        and encoder.pos_embed.shape[1] == encoder.patch_embed.num_patches + 1
        and isinstance(encoder.norm_pre, nn.Identity)
        and isinstance(encoder.norm, nn.LayerNorm)
        and encoder.patch_embed.proj.bias is not None
        and isinstance(encoder.patch_embed.norm, nn.Identity)
    )
