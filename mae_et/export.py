"""Write a checkpoint in the layouts of other libraries: each opens there with no conversion.

timm: safetensors of a `VisionTransformer`. mae: a `.pth` in the layout of facebookresearch/mae. hf:
a folder for transformers' `ViTMAEForPreTraining`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from mae_et.atomic import write_atomically, write_text_atomically
from mae_et.errors import UserError
from mae_et.model import MaskedAutoencoder
from mae_et.position import sincos_positions
from mae_et.pretrained import load_pretrained
from mae_et.weights import MAE_DECODER, Tensors

Format = Literal["timm", "hf", "mae"]

# Our names, in the order in which they are tried, to those that transformers keeps on disk; the
# decoder's blocks in the spelling that every version reads.
TO_HF = {
    r"blocks\.(\d+)\.norm1\.(\w+)": r"{blocks}.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(\w+)": r"{blocks}.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.attn\.proj\.(\w+)": r"{blocks}.\1.attention.output.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(\w+)": r"{blocks}.\1.intermediate.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(\w+)": r"{blocks}.\1.output.dense.\2",
    r"patch_embed\.proj\.(\w+)": r"vit.embeddings.patch_embeddings.projection.\1",
    r"cls_token": r"vit.embeddings.cls_token",
    r"pos_embed": r"{positions}",
    r"norm\.(\w+)": r"{norm}.\1",
    r"embed\.(\w+)": r"decoder.decoder_embed.\1",
    r"pred\.(\w+)": r"decoder.decoder_pred.\1",
    r"mask_token": r"decoder.mask_token",
}
HF_ENCODER = {
    "blocks": "vit.encoder.layer",
    "norm": "vit.layernorm",
    "positions": "vit.embeddings.position_embeddings",
}
HF_DECODER = {
    "blocks": "decoder.decoder_layers",
    "norm": "decoder.decoder_norm",
    "positions": "decoder.decoder_pos_embed",
}


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint in the layout of another library."""

    checkpoint: Path
    """Run folder, checkpoint, or file of released weights."""
    format: Format
    """timm: safetensors of the encoder; hf: folder for transformers' ViTMAEForPreTraining; mae:
    .pth in the layout of facebookresearch/mae."""
    output: Path
    """File to write (timm, mae), or folder (hf)."""
    encoder_heads: int | None = None
    """Heads of the encoder, where its width is no published one."""
    decoder_heads: int | None = None
    """Heads of the decoder, likewise."""


def export(
    checkpoint: str | Path,
    format: Format,  # noqa: A002  (the name on the command line)
    path: str | Path,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
) -> Path:
    """Write a checkpoint for another library.

    Args:
        checkpoint: run folder, checkpoint, or file of released weights.
        format: `timm`, `hf` or `mae`.
        path: the file to write, or the folder for `hf`.
        encoder_heads: heads of the encoder, where its width is no published one.
        decoder_heads: heads of the decoder, likewise.

    Returns:
        The path.

    Raises:
        UserError: the checkpoint cannot be read, the format cannot hold its decoder, or the path
            cannot be written.
    """
    model, path = load_pretrained(checkpoint, encoder_heads, decoder_heads), Path(path)
    write = {"timm": _write_timm, "hf": _write_hugging_face, "mae": _write_mae}.get(format)
    if write is None:
        raise UserError(f"format must be timm, hf or mae, got {format!r}")
    try:
        write(model, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return path


def _write_timm(model: MaskedAutoencoder, path: Path) -> None:
    content = safetensors_bytes(_contiguous(model.encoder.state_dict()), {"format": "pt"})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _write_mae(model: MaskedAutoencoder, path: Path) -> None:
    weights = dict(model.encoder.state_dict())
    ours_to_theirs = {ours: theirs for theirs, ours in MAE_DECODER.items()}
    for name, tensor in _decoder(model).items():
        ours = next((prefix for prefix in ours_to_theirs if name.startswith(prefix)), "")
        weights[ours_to_theirs.get(ours, "decoder_") + name.removeprefix(ours)] = tensor
    payload = {"model": _contiguous(weights)}
    write_atomically(path, lambda temporary: torch.save(payload, temporary))


def _write_hugging_face(model: MaskedAutoencoder, folder: Path) -> None:
    if model.decoder is None:
        raise UserError("format hf needs a decoder, which this checkpoint has not; use timm")
    if model.target == "hog":
        raise UserError("format hf holds decoders of pixels, and this one predicts HOG; use timm")
    if model.full[0] != model.full[1]:
        raise UserError("format hf holds square models only")
    weights: Tensors = {}
    for part, places in ((model.encoder.state_dict(), HF_ENCODER), (_decoder(model), HF_DECODER)):
        for name, tensor in part.items():
            weights |= _to_hugging_face(name, tensor, places)
    content = safetensors_bytes(_contiguous(weights), {"format": "pt"})
    write_atomically(folder / "model.safetensors", lambda temporary: temporary.write_bytes(content))
    write_text_atomically(folder / "config.json", json.dumps(_hugging_face_config(model), indent=2))


def _to_hugging_face(name: str, tensor: Tensor, places: dict[str, str]) -> Tensors:
    """Return what one tensor becomes: itself renamed, or query, key and value."""
    joined = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name)
    if joined:
        return {
            f"{places['blocks']}.{joined[1]}.attention.attention.{part}.{joined[2]}": third
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        }
    for pattern, replacement in TO_HF.items():
        found = re.fullmatch(pattern, name)
        if found:
            return {found.expand(replacement).format(**places): tensor}
    raise UserError(f"format hf has no place for {name}")


def _hugging_face_config(model: MaskedAutoencoder) -> dict[str, object]:
    # timm's blocks are modules of no static type.
    encoder: Any = model.encoder
    decoder: Any = model.decoder
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "image_size": model.full[0] * model.patch,
        "patch_size": model.patch,
        "num_channels": model.channels,
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.blocks[0].attn.num_heads,
        "intermediate_size": encoder.blocks[0].mlp.fc1.out_features,
        "decoder_hidden_size": decoder.embed.out_features,
        "decoder_num_hidden_layers": len(decoder.blocks),
        "decoder_num_attention_heads": decoder.blocks[0].attn.num_heads,
        "decoder_intermediate_size": decoder.blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "qkv_bias": True,
        # transformers' own default is 1e-12.
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "mask_ratio": 0.75,
        "norm_pix_loss": model.target == "norm_pix",
    }


def _decoder(model: MaskedAutoencoder) -> Tensors:
    """Return the decoder's weights, with the positions that other layouts store."""
    if model.decoder is None:
        return {}
    width = model.decoder.embed.out_features
    table = sincos_positions(model.full, model.full, width, torch.device("cpu"))
    positions = torch.cat([torch.zeros(1, width), table])[None]
    return dict(model.decoder.state_dict()) | {"pos_embed": positions}


def _contiguous(weights: Tensors) -> Tensors:
    """Return tensors that share no memory, as files need them."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
