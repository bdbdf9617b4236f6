"""Read pre-trained masked autoencoders: our own run folders and files, and the layout of MAE's.

The layout of the released files and their widths: facebookresearch/mae, README and FINETUNE.md.
A file is recognised by what it holds, never by its name.
"""

import argparse
import json
import pathlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mae_et.checkpoint import MODEL_KEY, newest_checkpoint
from mae_et.config import ModelConfig, PretrainConfig, Target
from mae_et.config_files import config_from_text
from mae_et.errors import UserError
from mae_et.model import MaskedAutoencoder

MAE_DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}
# Heads leave no trace in the weights; these are the published models' (MAE, tables 1 and A).
PUBLISHED_ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
PUBLISHED_DECODER_HEADS = {512: 16}


def load_pretrained(
    path: str | Path,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
    target: Target | None = None,
) -> MaskedAutoencoder:
    """Load a masked autoencoder; nothing in the file is executed.

    Args:
        path: a run folder, one of our checkpoints, an encoder as safetensors, or a `.pth` in MAE's
            layout, released or of a training run.
        encoder_heads: heads of the encoder, where its width is no published one.
        decoder_heads: heads of the decoder, likewise.
        target: what the decoder predicts, where the file does not say; norm_pix by default.

    Returns:
        The model on the CPU, in evaluation mode; `decoder` is None if the file has none.

    Raises:
        UserError: no such file, an unreadable or unknown one, or heads that must be given.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")
    if path.is_dir():
        payload = newest_checkpoint(path / "checkpoints")
        if payload is None:
            raise UserError(f"{path} holds no checkpoint that loads")
    else:
        payload = read_weights(path)
    if "config" in payload and "plan" in payload:
        model = MaskedAutoencoder.from_config(config_of(payload).model)
        model.load_state_dict(payload["model"])
        return model.eval()
    if MODEL_KEY in payload:
        model = MaskedAutoencoder.from_config(ModelConfig(**payload[MODEL_KEY]), decoder=False)
        model.encoder.load_state_dict(payload["model"])
        return model.eval()
    weights = payload.get("model", payload)
    if not isinstance(weights, dict) or "patch_embed.proj.weight" not in weights:
        raise UserError(f"{path} holds no vision transformer: there is no patch_embed.proj.weight")
    return _from_mae_layout(path, weights, encoder_heads, decoder_heads, target).eval()


def stored_config(path: Path) -> PretrainConfig | None:
    """Return the config of a run folder or of one of our checkpoints; None for other files."""
    if path.is_dir():
        payload = newest_checkpoint(path / "checkpoints")
    else:
        payload = read_weights(path) if path.is_file() else None
    return config_of(payload) if payload and "config" in payload and "plan" in payload else None


def config_of(payload: dict[str, Any]) -> PretrainConfig:
    """Return the config that a checkpoint of ours carries."""
    return config_from_text(payload["config"])


def read_weights(path: Path) -> dict[str, Any]:
    """Read a file of weights without running anything in it.

    Raises:
        UserError: the file is unreadable, or holds objects other than tensors and plain types.
    """
    try:
        with path.open("rb") as file:
            is_pickle = file.read(2) in {b"PK", b"\x80\x02"}
        if not is_pickle:
            return _read_safetensors(path)
        # Training checkpoints of MAE carry their arguments; both classes are plain holders.
        with torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath]):
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|class)\s+([\w.]+)", str(error))
        held = f"it holds {named[1]}" if named else "it is not a plain file of tensors"
        raise UserError(f"{path} is refused: {held}") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(payload, dict):
        raise UserError(f"{path} holds a {type(payload).__name__}, not weights")
    return payload


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read tensors, and, where our key is in the metadata, the config of their model."""
    with safe_open(path, framework="pt") as file:
        described = (file.metadata() or {}).get(MODEL_KEY)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {MODEL_KEY: json.loads(described), "model": weights} if described else weights


def _from_mae_layout(
    path: Path,
    weights: dict[str, Tensor],
    encoder_heads: int | None,
    decoder_heads: int | None,
    target: Target | None,
) -> MaskedAutoencoder:
    if weights["patch_embed.proj.weight"].ndim != 4 or "pos_embed" not in weights:
        raise UserError(f"{path} holds no plain vision transformer: no pos_embed or 2-D patches")
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    has_decoder = "decoder_embed.weight" in weights
    decoder_width = weights["decoder_embed.weight"].shape[0] if has_decoder else 512
    decoder_depth = _depth(weights, "decoder_blocks") if has_decoder else 0
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    model = MaskedAutoencoder(
        image_size=side * patch,
        patch_size=patch,
        channels=channels,
        encoder_width=width,
        encoder_depth=_depth(weights, "blocks"),
        encoder_heads=_heads("encoder", width, encoder_heads, PUBLISHED_ENCODER_HEADS),
        decoder_width=decoder_width,
        decoder_depth=decoder_depth,
        decoder_heads=_heads("decoder", decoder_width, decoder_heads, PUBLISHED_DECODER_HEADS),
        target=target or "norm_pix",
    )
    renamed = {from_mae_name(name): tensor for name, tensor in weights.items()}
    renamed.pop("decoder_pos_embed", None)  # always computed
    _check_positions(path, renamed["encoder.pos_embed"], model)
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {' '.join(str(error).split())}") from None
    return model


def from_mae_name(name: str) -> str:
    """Return our name of a tensor in MAE's layout."""
    for theirs, ours in MAE_DECODER.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name if name == "decoder_pos_embed" else f"encoder.{name}"


def _check_positions(path: Path, positions: Tensor, model: MaskedAutoencoder) -> None:
    table = model.encoder.pos_embed
    assert table is not None  # checked when it was built
    if positions.shape != table.shape or not torch.allclose(positions, table, atol=1e-4):
        raise UserError(
            f"{path} has positions other than MAE's fixed sine-cosine table, so it is no masked "
            "autoencoder's (fine-tuned or learned positions)"
        )


def _depth(weights: dict[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith(f"{prefix}.")})


def _heads(part: str, width: int, given: int | None, published: dict[int, int]) -> int:
    heads = given or published.get(width)
    if heads is None:
        raise UserError(
            f"the {part}'s number of heads cannot be read from weights of width {width}: give "
            f"{part}_heads"
        )
    return heads
