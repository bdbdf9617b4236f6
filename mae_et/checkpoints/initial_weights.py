"""Start a masked autoencoder from the weights of another one, or of any plain ViT.

weights -> same encoder? -> patch embedding, positions relaid -> encoder
-> decoder, if it fits the config, else a fresh one   -> decoder
"""

import hashlib
from dataclasses import dataclass

import torch
from timm.layers import resample_patch_embed
from torch import Tensor

from mae_et.checkpoints.load import (
    PUBLISHED_DECODER_HEADS,
    PUBLISHED_ENCODER_HEADS,
    is_sincos,
)
from mae_et.checkpoints.state_dicts import Tensors, depth_of, describe_mismatch
from mae_et.checkpoints.weights import Weights
from mae_et.config.init import InitConfig
from mae_et.config.model import ModelConfig, Target
from mae_et.errors import UserError
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.pos_embed import sincos_positions


@dataclass(frozen=True)
class InitialWeights:
    """What a model was started from."""

    sha256: str
    """SHA-256 of the names, shapes and values of all tensors, as read."""
    summary: str
    """What was taken, what was changed, and what is fresh."""


def initialise_from(
    model: MaskedAutoencoder, config: ModelConfig, init: InitConfig, weights: Weights
) -> InitialWeights:
    """Load the encoder of weights into a model, and their decoder if it fits; in place.

    Positions are always the model's own fixed sine-cosine table. A learned table is dropped, except
    for the class token's position, which is added to the class token. The patch embedding of
    another patch size is resampled by the pseudo-inverse (FlexiViT, arXiv 2212.08013).

    Args:
        model: new model, on the CPU.
        config: config it was built from.
        init: whether to take the decoder.
        weights: weights to start from.

    Raises:
        UserError: the weights are those of another encoder; the sentence names both.
    """
    sha256 = _hash({"encoder": weights.encoder, "decoder": weights.decoder})
    heads = _encoder_heads(weights)
    _check_same_encoder(model, config, weights, heads)
    encoder, changes = _adapted_encoder(model, weights)
    mismatch = describe_mismatch(encoder, model.encoder.state_dict())
    if mismatch:
        raise UserError(
            f"init.weights {weights.path} is no encoder like model.encoder {config.encoder}: "
            f"{mismatch}"
        )
    model.encoder.load_state_dict(encoder)
    fresh = _why_fresh(model, config, init, weights)
    if not fresh:
        assert model.decoder is not None
        model.decoder.load_state_dict(weights.decoder)
    taken = f"encoder taken, decoder fresh ({fresh})" if fresh else "encoder and decoder taken"
    unknown = [] if heads else [f"{_heads(model.encoder)} heads assumed, as in the config"]
    return InitialWeights(sha256, "; ".join([taken, *changes, *unknown]))


def _hash(parts: dict[str, Tensors]) -> str:
    digest = hashlib.sha256()
    for part, tensors in parts.items():
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{part}.{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _heads(transformer: torch.nn.Module) -> int:
    return int(transformer.blocks[0].attn.num_heads)  # type: ignore[index, union-attr]


def _encoder_heads(weights: Weights) -> int | None:
    """Return the heads of the encoder: recorded, or published for its width; None if unknown."""
    if weights.model is not None:
        with torch.device("meta"):
            return _heads(MaskedAutoencoder.from_config(weights.model, decoder=False).encoder)
    width = weights.encoder["patch_embed.proj.weight"].shape[0]
    return weights.encoder_num_heads or PUBLISHED_ENCODER_HEADS.get(width)


def _check_same_encoder(
    model: MaskedAutoencoder, config: ModelConfig, weights: Weights, heads: int | None
) -> None:
    """Compare width, depth, heads and channels.

    Raises:
        UserError: they differ.
    """
    own_heads = _heads(model.encoder)
    own = _describe(model.encoder.state_dict(), own_heads)
    theirs = _describe(weights.encoder, heads or own_heads)
    if own != theirs:
        raise UserError(
            f"init.weights {weights.path} has an encoder of {theirs}, but model.encoder "
            f"{config.encoder} has {own}: set model.encoder and model.channels to those of the "
            "weights"
        )


def _describe(encoder: Tensors, heads: int) -> str:
    width, channels, *_ = encoder["patch_embed.proj.weight"].shape
    return f"width {width}, depth {depth_of(encoder)}, {heads} heads and {channels} channels"


def _adapted_encoder(model: MaskedAutoencoder, weights: Weights) -> tuple[Tensors, list[str]]:
    """Return the encoder's tensors for a model's patch and grid, and what was changed."""
    tensors, changes = dict(weights.encoder), []
    projection = tensors["patch_embed.proj.weight"]
    patch = projection.shape[-1]
    if projection.shape[-2:] != (model.patch, model.patch):
        tensors["patch_embed.proj.weight"] = resample_patch_embed(
            projection, [model.patch, model.patch]
        )
        changes.append(f"patch embedding resampled from {patch} to {model.patch} pixels")
    positions, table = tensors["pos_embed"], model.encoder.pos_embed
    assert table is not None  # a plain ViT
    tensors["pos_embed"] = table.detach()
    side = round((positions.shape[1] - 1) ** 0.5)
    if not _is_fixed(positions, side):
        changes.append("learned positions replaced by the fixed sine-cosine table")
        if "cls_token" in tensors and positions.shape[1] == side * side + 1:
            tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
    elif (side, side) != model.full:
        rows, columns = model.full
        changes.append(f"positions laid on {rows}x{columns} patches instead of {side}x{side}")
    return tensors, changes


def _is_fixed(positions: Tensor, side: int) -> bool:
    """Return whether positions [1 N D] are MAE's fixed table of a square grid."""
    if positions.shape[1] != side * side + 1 or positions.shape[2] % 4:
        return False
    table = torch.zeros_like(positions)
    grid = (side, side)
    table[0, 1:] = sincos_positions(grid, grid, positions.shape[2], table.device)
    return is_sincos(positions, table)


def _why_fresh(
    model: MaskedAutoencoder, config: ModelConfig, init: InitConfig, weights: Weights
) -> str:
    """Return why the decoder of weights is not taken; empty if it is."""
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
    published = PUBLISHED_DECODER_HEADS.get(weights.decoder["norm.weight"].shape[0])
    return weights.decoder_num_heads or published, weights.target
