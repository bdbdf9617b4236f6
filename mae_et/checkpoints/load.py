"""Build masked autoencoders from our own and released checkpoints."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from mae_et.checkpoints.fixed_positions import fixed_grid_of, is_sincos
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.state_dicts import depth_of, describe_mismatch
from mae_et.checkpoints.weights import Weights
from mae_et.config.model import Target
from mae_et.curriculum.mae_cost import ENCODERS
from mae_et.errors import UserError
from mae_et.models.encoder import set_norm_eps
from mae_et.models.mae import MaskedAutoencoder
from mae_et.runtime.console import notify

# Weights do not show the number of heads; these are published (MAE, tables 1 and A).
PUBLISHED_HEADS = {
    "encoder": {width: heads for width, _, heads in ENCODERS.values()},
    "decoder": {512: 16},
}


def load_pretrained(
    path: str | Path,
    encoder_num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    target: Target | None = None,
    decoder: bool = True,
    checkpoint_key: str | None = None,
) -> MaskedAutoencoder:
    """Load a masked autoencoder; nothing in the file is executed.

    Args:
        path: run folder, checkpoint, exported encoder, `.pth` in MAE's layout (released or of a
            training run), weights of a timm ViT, or folder of Hugging Face's ViTMAE.
        encoder_num_heads: attention heads of the encoder, required if the file does not record
            them and its width is not a published one.
        decoder_num_heads: attention heads of the decoder, likewise.
        target: target of the decoder if the file does not record it; norm_pix by default.
        decoder: whether to load the decoder; if false, its kind does not matter.
        checkpoint_key: choice among several sets of weights in a file, such as `teacher`.

    Returns:
        The model on the CPU, in evaluation mode; its `decoder` is None if the file has none.

    Raises:
        UserError: the file is missing, unreadable or of an unknown layout; the number of heads is
            unknown; or positions are learned.
    """
    weights = load_weights(Path(path), checkpoint_key)
    weights = weights.with_given(encoder_num_heads, decoder_num_heads, target)
    return masked_autoencoder(weights, decoder)


def masked_autoencoder(weights: Weights, decoder: bool = True) -> MaskedAutoencoder:
    """Build a masked autoencoder from weights in memory; see `load_pretrained`."""
    path = weights.path
    if not decoder:
        weights = replace(weights, decoder={})
    if weights.head:
        raise UserError(f"{path} holds a classifier (head.*), not a masked autoencoder")
    model = _build(weights)
    table = model.encoder.pos_embed
    positions = weights.encoder["pos_embed"]
    assert table is not None  # checked when it was built
    if positions.shape != table.shape or not is_sincos(positions, table):
        raise UserError(
            f"{path} has positions other than MAE's fixed sine-cosine table "
            "(fine-tuned or learned ones): it is not a masked autoencoder"
        )
    theirs = {
        f"{part}.{name}": tensor
        for part, tensors in (("encoder", weights.encoder), ("decoder", weights.decoder))
        for name, tensor in tensors.items()
    }
    mismatch = describe_mismatch(theirs, model.state_dict())
    if mismatch:
        raise UserError(f"{path} does not fit: {mismatch}")
    model.load_state_dict(theirs)
    set_norm_eps(model, weights.norm_eps)
    return model.eval()


def num_heads_of(part: Literal["encoder", "decoder"], width: int, given: int | None) -> int:
    """Return a transformer's number of heads: as given, or as published for its width."""
    heads = given or PUBLISHED_HEADS[part].get(width)
    if heads is None:
        raise UserError(
            f"the {part}'s number of heads cannot be read from weights of width {width}: give "
            f"{part}_num_heads"
        )
    if given is None:
        # MoCo v3's ViT-S has twice the usual number.
        notify(
            f"the weights do not record the {part}'s heads: {heads}, as published for "
            f"width {width} (or give {part}_num_heads)"
        )
    if heads < 1 or width % heads:
        raise UserError(
            f"{part}_num_heads {heads} does not divide the width {width} of the weights"
        )
    return heads


def _build(weights: Weights) -> MaskedAutoencoder:
    """Build the model that a file's config or shapes describe."""
    if weights.model is not None:
        return MaskedAutoencoder.from_config(weights.model, decoder=bool(weights.decoder))
    width, channels, patch, _ = weights.encoder["patch_embed.proj.weight"].shape
    side = round((weights.encoder["pos_embed"].shape[1] - 1) ** 0.5)
    model = partial(
        MaskedAutoencoder,
        image_size=side * patch,
        patch_size=patch,
        channels=channels,
        encoder_embed_dim=width,
        encoder_depth=depth_of(weights.encoder),
        encoder_num_heads=num_heads_of("encoder", width, weights.encoder_num_heads),
        position_grid=fixed_grid_of(weights.encoder["pos_embed"]),
        target=weights.target or "norm_pix",
    )
    if not weights.decoder:
        return model(decoder_depth=0)
    if "embed.weight" not in weights.decoder:
        raise UserError(f"{weights.path} has parts of a decoder, but no decoder_embed.weight")
    if weights.target is None:
        notify(f"{weights.path} records no target of its decoder: norm_pix is taken")
    decoder_embed_dim = weights.decoder["embed.weight"].shape[0]
    return model(
        decoder_embed_dim=decoder_embed_dim,
        decoder_depth=depth_of(weights.decoder),
        decoder_num_heads=num_heads_of("decoder", decoder_embed_dim, weights.decoder_num_heads),
    )
