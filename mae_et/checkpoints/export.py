"""Write a checkpoint in the layouts of other libraries: each opens there with no conversion.

timm: safetensors of a `VisionTransformer`. mae: a `.pth` in the layout of facebookresearch/mae. hf:
a folder for transformers' `ViTMAEForPreTraining`.

A masked autoencoder is built first, so that what is written is one. A classifier is not: its
tensors are written as they are, for its positions may have been trained, or be of another size.
"""

import json
import re
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save as safetensors_bytes

from mae_et.checkpoints.formats import Weights, load_weights
from mae_et.checkpoints.hugging_face import to_hugging_face
from mae_et.checkpoints.load import masked_autoencoder
from mae_et.checkpoints.mae_layout import MAE_DECODER, PROBE_EPSILON
from mae_et.checkpoints.state_dicts import Tensors, depth_of, describe_mismatch
from mae_et.config.commands import Format
from mae_et.errors import UserError
from mae_et.io.atomic import write_atomically, write_text_atomically
from mae_et.models.encoder import create_vit
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.pos_embed import sincos_positions

# Parts of a block that MAE's code builds.
MAE_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def export(
    checkpoint: str | Path,
    format: Format,  # noqa: A002  (the name on the command line)
    path: str | Path,
    encoder_num_heads: int | None = None,
    decoder_num_heads: int | None = None,
) -> Path:
    """Write a checkpoint for another library.

    A classifier's file holds its head too. In timm it opens as a `VisionTransformer` with as many
    `num_classes`, the image size that it was trained at, and, by the norm in the file, a
    `global_pool` of `avg` (`fc_norm`), `token` (`norm`) or `map` (`attn_pool`). A linear probe's
    normalisation, which timm has not, becomes part of the head's product; `mae` keeps it.

    Args:
        checkpoint: run folder, checkpoint, or file of released weights, of a masked autoencoder or
            of a ViT that classifies; of the latter's folder the last weights are taken.
        format: `timm`, `hf` or `mae`.
        path: the file to write, or the folder for `hf`.
        encoder_num_heads: heads of the encoder, where its width is no published one; they leave no
            trace in a classifier's file.
        decoder_num_heads: heads of the decoder, likewise.

    Returns:
        The path.

    Raises:
        UserError: the checkpoint cannot be read, the format cannot hold its decoder or its head, or
            the path cannot be written.
    """
    if format not in get_args(Format):
        raise UserError(f"format must be timm, hf or mae, got {format!r}")
    weights, path = load_weights(Path(checkpoint)), Path(path)
    try:
        if weights.head:
            _write_classifier(weights, format, path)
        else:
            model = masked_autoencoder(weights, encoder_num_heads, decoder_num_heads)
            _write_masked_autoencoder(model, format, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return path


def _write_masked_autoencoder(model: MaskedAutoencoder, format: Format, path: Path) -> None:  # noqa: A002
    encoder = dict(model.encoder.state_dict())
    if format == "hf":
        _write_hugging_face(model, path)
    elif format == "timm":
        _write_safetensors(encoder, path)
    else:
        _check_mae_blocks(encoder)
        _write_mae(encoder | _mae_decoder(model), path)


def _check_mae_blocks(encoder: Tensors) -> None:
    """Refuse blocks that MAE's code does not build, such as those with LayerScale.

    Raises:
        UserError: the sentence names a tensor that it would not know.
    """
    for name in encoder:
        block = re.fullmatch(r"blocks\.\d+\.(.*)\.(?:weight|bias|gamma)", name)
        if block and block[1] not in MAE_BLOCK:
            raise UserError(f"format mae has no place for {name}; use timm")


def _write_classifier(weights: Weights, format: Format, path: Path) -> None:  # noqa: A002
    if format == "hf":
        raise UserError("format hf holds no classifier, for ViTMAE has none; use timm or mae")
    _check_classifier(weights)
    if format == "timm":
        _write_safetensors(weights.encoder | _head_of_timm(weights.head), path)
        return
    if "attn_pool.latent" in weights.encoder:
        raise UserError(
            "format mae holds no attentive pooling, which this classifier has; use timm"
        )
    _write_mae(weights.encoder | _head_of_mae(weights.head), path)


def _check_classifier(weights: Weights) -> None:
    """Refuse tensors that timm's network of these shapes would not take.

    Raises:
        UserError: the sentence lists them.
    """
    encoder = weights.encoder
    width, channels, patch, _ = encoder["patch_embed.proj.weight"].shape
    pool = "token" if "norm.weight" in encoder else "avg"
    with torch.device("meta"):
        network = create_vit(
            weights.architecture,
            # The table does not tell its sides, and any of as many patches have its shape.
            img_size=(patch * max(encoder["pos_embed"].shape[1] - 1, 1), patch),
            patch_size=patch,
            in_chans=channels,
            embed_dim=width,
            depth=depth_of(encoder),
            num_heads=1,  # of any number of heads the shapes are the same
            num_classes=len(weights.head.get("weight", weights.head.get("bias", ()))),
            global_pool="map" if "attn_pool.latent" in encoder else pool,
        )
    expected = dict(network.state_dict())
    statistics = ("running_mean", "running_var")
    if any(name in weights.head for name in statistics):
        expected |= {f"head.{name}": torch.empty(width, device="meta") for name in statistics}
    head = {f"head.{name}": tensor for name, tensor in weights.head.items()}
    mismatch = describe_mismatch(encoder | head, expected)
    if mismatch:
        raise UserError(f"{weights.path} does not fit timm's VisionTransformer: {mismatch}")


def _head_of_timm(head: Tensors) -> Tensors:
    """Return a linear layer; a probe's normalisation before it is a part of its product."""
    weight, bias = head["weight"].double(), head["bias"].double()
    if "running_mean" in head:
        weight = weight * (head["running_var"].double() + PROBE_EPSILON).rsqrt()
        bias = bias - weight @ head["running_mean"].double()
    dtype = head["weight"].dtype
    return {"head.weight": weight.to(dtype), "head.bias": bias.to(dtype)}


def _head_of_mae(head: Tensors) -> Tensors:
    """Return a linear layer, after a probe's normalisation where there is one."""
    if "running_mean" not in head:
        return {f"head.{name}": tensor for name, tensor in head.items()}
    places = {"running_mean": 0, "running_var": 0, "weight": 1, "bias": 1}
    # How many batches there were is read, and counts for nothing.
    counted = {"head.0.num_batches_tracked": torch.tensor(0)}
    return {f"head.{places[name]}.{name}": tensor for name, tensor in head.items()} | counted


def _mae_decoder(model: MaskedAutoencoder) -> Tensors:
    if model.decoder is not None and model.decoder.attention != "self":
        raise UserError("format mae holds MAE's decoder, and this one is cross; use timm")
    ours_to_theirs = {ours: theirs for theirs, ours in MAE_DECODER.items()}
    weights = {}
    for name, tensor in _decoder(model).items():
        ours = next((prefix for prefix in ours_to_theirs if name.startswith(prefix)), "")
        weights[ours_to_theirs.get(ours, "decoder_") + name.removeprefix(ours)] = tensor
    return weights


def _write_safetensors(weights: Tensors, path: Path) -> None:
    content = safetensors_bytes(_contiguous(weights), {"format": "pt"})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _write_mae(weights: Tensors, path: Path) -> None:
    payload = {"model": _contiguous(weights)}
    write_atomically(path, lambda temporary: torch.save(payload, temporary))


def _write_hugging_face(model: MaskedAutoencoder, folder: Path) -> None:
    weights, about = to_hugging_face(model, _decoder(model))
    _write_safetensors(weights, folder / "model.safetensors")
    write_text_atomically(folder / "config.json", json.dumps(about, indent=2))


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
