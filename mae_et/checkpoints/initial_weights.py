"""Initialise a masked autoencoder from another one, or from any plain ViT.

The encoder must match the config; its patch embedding and positions are adapted to the config's
patch size and grid. The decoder is loaded if all of it fits.
"""

import math
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_patch_embed

from mae_et.checkpoints.checksums import sha256_of_tensors
from mae_et.checkpoints.fixed_positions import fixed_grid_of
from mae_et.checkpoints.formats import load_weights, peek_weights
from mae_et.checkpoints.load import PUBLISHED_HEADS
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.state_dicts import Tensors, depth_of, describe_mismatch
from mae_et.checkpoints.weights import Weights
from mae_et.config.data import DataConfig
from mae_et.config.init import InitConfig
from mae_et.config.model import ModelConfig, Target
from mae_et.config.schema import PretrainConfig
from mae_et.errors import UserError
from mae_et.models.mae import MaskedAutoencoder
from mae_et.runtime.agreement import check_ranks_agree, fail_together
from mae_et.runtime.console import say
from mae_et.runtime.distributed import DistributedContext


def inherited_settings(path: Path, config: ModelConfig, key: str | None) -> dict[str, Any]:
    """Return the keys of a pre-training config that follow from its initial weights.

    These are the image statistics, if recorded, and the grid of fixed positions, if it is not the
    config's. The weights are kept for the next `load_weights`.
    """
    weights = peek_weights(path, key)
    settings = weights.preprocessing.data_settings() if weights.preprocessing else {}
    keys = {f"data.{name}": value for name, value in settings.items()}
    grid = fixed_grid_of(weights.encoder["pos_embed"])
    if grid is not None and grid != config.image_size // config.patch:
        keys["model.position_grid"] = grid
    return keys


def load_initial_weights(
    model: MaskedAutoencoder, config: PretrainConfig, world: DistributedContext
) -> str | None:
    """Load the config's initial weights into a new model, and report them.

    The model must be on the CPU, neither wrapped nor sharded: every rank loads all weights.

    Returns:
        SHA-256 of the weights, recorded in checkpoints; None without `init.weights`.
    """
    path = config.init.weights
    if path is None:
        return None
    with fail_together(world):
        weights = load_weights(path, config.init.checkpoint_key)
        parts = {"encoder": weights.encoder, "decoder": weights.decoder}
        sha256 = sha256_of_tensors(
            {f"{part}.{name}": parts[part][name] for part in parts for name in sorted(parts[part])}
        )
        summary = _initialise(model, config.model, config.init, weights)
    check_ranks_agree({"the hash of init.weights": sha256}, world)
    if world.is_main:
        statistics = _describe_statistics(weights.preprocessing, config.data)
        say(f"starting from {path} (sha256 {sha256[:12]}): {summary}; {statistics}")
    return sha256


def _describe_statistics(recorded: Preprocessing | None, data: DataConfig) -> str:
    """Describe whether images are prepared as for the weights, as part of a sentence."""
    if recorded is None:
        return "the weights record no mean and std: those of the config are used"
    differing = recorded.differences(data)
    return f"but {', '.join(differing)}" if differing else "mean and std as for the weights"


def _initialise(
    model: MaskedAutoencoder, config: ModelConfig, init: InitConfig, weights: Weights
) -> str:
    """Load the encoder of weights into a model, and their decoder if it fits; describe it.

    Positions are always the model's own fixed sine-cosine table, scaled by `position_grid` to the
    grid of the weights, as for a smaller bandwidth. A learned table is dropped, except
    for the class token's position, which is added to the class token. The patch embedding of
    another patch size is resampled by the pseudo-inverse (FlexiViT, arXiv 2212.08013).
    """
    heads = _encoder_heads(weights)
    _check_same_encoder(model, config, weights, heads)
    encoder, changes = _adapted_encoder(model, weights)
    mismatch = describe_mismatch(encoder, model.encoder.state_dict())
    if mismatch:
        raise UserError(
            f"init.weights {weights.path} is not like model.encoder {config.encoder}: {mismatch}"
        )
    model.encoder.load_state_dict(encoder)
    fresh = _why_fresh(model, config, init, weights)
    if not fresh:
        assert model.decoder is not None
        model.decoder.load_state_dict(weights.decoder)
    taken = f"encoder taken, decoder fresh ({fresh})" if fresh else "encoder and decoder taken"
    unknown = [] if heads else [f"{_heads(model.encoder)} heads assumed, as in the config"]
    return "; ".join([taken, *changes, *unknown])


def _heads(transformer: torch.nn.Module) -> int:
    return int(transformer.blocks[0].attn.num_heads)  # type: ignore[index, union-attr]


def _encoder_heads(weights: Weights) -> int | None:
    """Return the heads of the encoder: recorded, or published for its width; None if unknown."""
    if weights.model is not None:
        with torch.device("meta"):
            return _heads(MaskedAutoencoder.from_config(weights.model, decoder=False).encoder)
    width = weights.encoder["patch_embed.proj.weight"].shape[0]
    return weights.encoder_num_heads or PUBLISHED_HEADS["encoder"].get(width)


def _check_same_encoder(
    model: MaskedAutoencoder, config: ModelConfig, weights: Weights, heads: int | None
) -> None:
    """Refuse an encoder of another width, depth, heads or channels."""
    own_heads = _heads(model.encoder)
    own = _describe(model.encoder.state_dict(), own_heads)
    theirs = _describe(weights.encoder, heads or own_heads)
    if own != theirs:
        raise UserError(
            f"init.weights {weights.path} has an encoder of {theirs}, but model.encoder "
            f"{config.encoder} has {own}: set model.encoder, its overrides and model.channels to "
            "those of the weights"
        )


def _describe(encoder: Tensors, heads: int) -> str:
    width, channels, *_ = encoder["patch_embed.proj.weight"].shape
    return f"width {width}, depth {depth_of(encoder)}, {heads} heads and {channels} channels"


def _adapted_encoder(model: MaskedAutoencoder, weights: Weights) -> tuple[Tensors, list[str]]:
    """Return the encoder's tensors adapted to a model's patch and grid, and the changes made."""
    tensors, changes = dict(weights.encoder), []
    projection = tensors["patch_embed.proj.weight"]
    patch = projection.shape[-1]
    if projection.shape[-2:] != (model.patch, model.patch):
        tensors["patch_embed.proj.weight"] = resample_patch_embed(
            projection, [model.patch, model.patch]
        )
        changes.append(f"patch embedding resampled from {patch} to {model.patch} pixels")
    eps = getattr(model.encoder.norm, "eps", None)
    if weights.norm_eps not in {None, eps}:
        changes.append(f"layer norms of epsilon {eps}, not {weights.norm_eps}")
    positions, table = tensors["pos_embed"], model.encoder.pos_embed
    assert table is not None  # a plain ViT
    tensors["pos_embed"] = table.detach()
    grid, (rows, columns) = fixed_grid_of(positions), model.base_grid
    if grid is None:
        changes.append("learned positions replaced by the fixed sine-cosine table")
        if "cls_token" in tensors and positions.shape[1] == math.isqrt(positions.shape[1]) ** 2 + 1:
            tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
    elif positions.shape != table.shape or not torch.allclose(positions, table, atol=1e-4):
        where = "laid over" if model.position_grid == (grid, grid) else "not laid over"
        changes.append(
            f"positions of {rows}x{columns} patches, {where} the {grid}x{grid} of the weights"
        )
    return tensors, changes


def _why_fresh(
    model: MaskedAutoencoder, config: ModelConfig, init: InitConfig, weights: Weights
) -> str:
    """Return why the decoder of weights is not loaded; empty if it is."""
    if init.decoder == "fresh":
        return "init.decoder fresh"
    if not weights.decoder:
        return "the weights have none"
    assert model.decoder is not None  # model.decoder_depth is positive
    if mismatch := describe_mismatch(weights.decoder, model.decoder.state_dict()):
        return f"it does not fit: {mismatch}"
    heads, target = _recorded(weights)
    pairs = {
        "decoder_num_heads": (config.decoder_num_heads, heads),
        "target": (config.target, target),
    }
    return ", ".join(
        f"model.{key} is {own}, not {theirs}"
        for key, (own, theirs) in pairs.items()
        if theirs not in {None, own}
    )


def _recorded(weights: Weights) -> tuple[int | None, Target | None]:
    """Return heads and target of a decoder, which its shapes do not show; None if unknown."""
    if weights.model is not None:
        return weights.model.decoder_num_heads, weights.model.target
    published = PUBLISHED_HEADS["decoder"].get(weights.decoder["norm.weight"].shape[0])
    return weights.decoder_num_heads or published, weights.target
