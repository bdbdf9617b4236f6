"""The layout of Hugging Face's ViTMAE: its names, its folders, and how they describe a model.

Names on disk have hardly changed over the versions of transformers, unlike those in memory. One
table holds them for both directions; what only some writers do is undone before it is asked.

Source: the `vit_mae` conversion of transformers.
"""

import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from mae_et.errors import UserError
from mae_et.io.plain_files import read_mapping
from mae_et.models.mae import MaskedAutoencoder

# Our names and theirs, after the number of a block.
BLOCK = {
    "norm1.*": "layernorm_before.*",
    "norm2.*": "layernorm_after.*",
    "attn.query.*": "attention.attention.query.*",
    "attn.key.*": "attention.attention.key.*",
    "attn.value.*": "attention.attention.value.*",
    "attn.proj.*": "attention.output.dense.*",
    "mlp.fc1.*": "intermediate.dense.*",
    "mlp.fc2.*": "output.dense.*",
}
# Our names and theirs: # is the number of a block, * is weight or bias.
NAMES = {
    "encoder": {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj.*": "vit.embeddings.patch_embeddings.projection.*",
        "norm.*": "vit.layernorm.*",
        **{f"blocks.#.{ours}": f"vit.encoder.layer.#.{theirs}" for ours, theirs in BLOCK.items()},
    },
    "decoder": {
        "mask_token": "decoder.mask_token",
        "pos_embed": "decoder.decoder_pos_embed",
        "embed.*": "decoder.decoder_embed.*",
        "norm.*": "decoder.decoder_norm.*",
        "pred.*": "decoder.decoder_pred.*",
        **{
            f"blocks.#.{ours}": f"decoder.decoder_layers.#.{theirs}"
            for ours, theirs in BLOCK.items()
        },
    },
}
# How transformers 5 spells the decoder's blocks; every version reads the older spelling too.
DECODER_BLOCKS_OF_5 = "decoder.decoder_encoder.layer."
THIRDS = ("query", "key", "value")
# Where transformers looks for weights, in its order.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def read_description(folder: Path) -> dict[str, Any]:
    """Return what the `config.json` of a folder says of its model.

    Raises:
        UserError: it cannot be read, or its model is of another kind.
    """
    about = read_mapping(folder / "config.json")
    if about.get("model_type") != "vit_mae":
        raise UserError(f"{folder} holds a {about.get('model_type')!r} model, not a vit_mae")
    return about


def read_tensors(folder: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Tensor]:
    """Read the weights of a folder, from one file or from those that an index lists.

    Args:
        folder: what `save_pretrained` wrote.
        read: reads a file of tensors, running nothing in it.

    Returns:
        The tensors, under the names on disk.

    Raises:
        UserError: there are none, a file of the index is not there, lies outside of the folder, or
            lacks what it should hold, or one cannot be read.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index, read)
    raise UserError(f"{folder} has neither {WEIGHT_FILES[0]} nor {WEIGHT_FILES[1]}, nor an index")


def from_hugging_face(
    folder: Path, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the encoder (timm's names) and the decoder (ours) of tensors under names on disk.

    They are those of a `ViTMAEForPreTraining`, or of a `ViTMAEModel`, which has no decoder.

    Raises:
        UserError: a tensor's name is unknown, or what every ViTMAE has is missing.
    """
    tables = {
        part: {theirs: ours for ours, theirs in table.items()} for part, table in NAMES.items()
    }
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in tensors.items():
        part, ours = _find(_on_disk(name), tables)
        if not ours:
            raise UserError(f"{folder} holds a tensor of unknown name: {name}")
        parts[part][ours] = tensor
    lacking = {"cls_token", "pos_embed", "patch_embed.proj.weight"} - parts["encoder"].keys()
    if lacking:
        theirs = (_rename(name, NAMES["encoder"]) for name in sorted(lacking))
        raise UserError(f"{folder} lacks {', '.join(theirs)}")
    parts["decoder"].pop("pos_embed", None)  # computed, not loaded
    return _join_qkv(parts["encoder"]), _join_qkv(parts["decoder"])


def to_hugging_face(
    model: MaskedAutoencoder, decoder: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return a model's tensors under the names on disk, and the description of its `config.json`.

    Args:
        model: the model.
        decoder: its decoder's weights and positions [1 1+N width], under our names.

    Raises:
        UserError: ViTMAE cannot be that model: it has MAE's decoder, of pixels, and square images.
    """
    if model.decoder is None:
        raise UserError("format hf needs a decoder, which this checkpoint has not; use timm")
    if model.decoder.attention != "self":
        raise UserError("format hf holds MAE's decoder, and this one is cross; use timm")
    if model.target == "hog":
        raise UserError("format hf holds decoders of pixels, and this one predicts HOG; use timm")
    if model.full[0] != model.full[1]:
        raise UserError("format hf holds square models only")
    parts = {"encoder": _split_qkv(model.encoder.state_dict()), "decoder": _split_qkv(decoder)}
    renamed = {}
    for part, table in NAMES.items():
        for name, tensor in parts[part].items():
            theirs = _rename(name, table)
            if not theirs:
                raise UserError(f"format hf has no place for {name}; use timm")
            renamed[theirs] = tensor
    return renamed, _describe(model)


def _read_shards(index: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Tensor]:
    placed = read_mapping(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{index} has no weight_map, which says where each tensor is")
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(name) for name in placed.values()}):
        # Links are followed, for the hub's cache keeps its files by them; paths are not.
        file = PurePath(name)
        if file.anchor or ".." in file.parts:
            raise UserError(f"{index} is refused: it names {name!r}, outside of its folder")
        if not (index.parent / file).is_file():
            raise UserError(f"{index} names {name!r}, which is not there")
        tensors |= read(index.parent / file)
    lacking = sorted(placed.keys() - tensors.keys())
    if lacking:
        # A last block that is not there would not be missed later: depth is read from names.
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        raise UserError(f"the files of {index} lack {', '.join(lacking[:5])}{more}")
    return tensors


def _on_disk(name: str) -> str:
    """Bring a name to the spelling of the table, whichever model and version wrote it."""
    if name.startswith(DECODER_BLOCKS_OF_5):
        return f"decoder.decoder_layers.{name.removeprefix(DECODER_BLOCKS_OF_5)}"
    # A ViTMAEModel alone is not called vit.
    return name if name.startswith(("vit.", "decoder.")) else f"vit.{name}"


def _find(name: str, tables: dict[str, dict[str, str]]) -> tuple[str, str]:
    """Return the part of a tensor and its name there; an empty name where it is unknown."""
    for part, table in tables.items():
        found = _rename(name, table)
        if found:
            return part, found
    return "", ""


def _rename(name: str, table: dict[str, str]) -> str:
    """Look a name up in one direction of the table; empty where it has none."""
    number = re.search(r"\.(\d+)\.", name)
    leaf = re.search(r"\.(weight|bias)$", name)
    pattern = name.replace(number[0], ".#.", 1) if number else name
    pattern = f"{pattern.removesuffix(leaf[0])}.*" if leaf else pattern
    found = table.get(pattern, "")
    found = found.replace("#", number[1]) if number else found
    return found.replace("*", leaf[1]) if leaf else found


def _split_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split timm's product into query, key and value, in this order."""
    apart: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        before, joined, leaf = name.partition(".attn.qkv.")
        if joined:
            thirds = zip(THIRDS, tensor.chunk(3), strict=True)
            apart |= {f"{before}.attn.{third}.{leaf}": part for third, part in thirds}
        else:
            apart[name] = tensor
    return apart


def _join_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `_split_qkv`."""
    joined = {}
    for name, tensor in weights.items():
        apart = re.fullmatch(r"(.*attn)\.(query|key|value)\.(\w+)", name)
        if not apart:
            joined[name] = tensor
        elif apart[2] == "query":
            names = [f"{apart[1]}.{third}.{apart[3]}" for third in THIRDS]
            lacking = [name for name in names if name not in weights]
            if lacking:
                raise UserError(f"a ViTMAE's weights lack {', '.join(lacking)}")
            joined[f"{apart[1]}.qkv.{apart[3]}"] = torch.cat([weights[name] for name in names])
    return joined


def _describe(model: MaskedAutoencoder) -> dict[str, object]:
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
