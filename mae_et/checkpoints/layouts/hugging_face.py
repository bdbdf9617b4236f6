"""Read Hugging Face folders of ViTMAE, ViT and DINOv2; convert names in both directions.

Names on disk have hardly changed over the versions of transformers, unlike those in memory. One
table maps them both ways; variants that only some writers use are normalised first.

Source: the `vit_mae`, `vit`, `dinov2` and `dinov2_with_registers` models of transformers.
"""

import re
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from mae_et.checkpoints.layouts.hugging_face_config import INDEX, WEIGHT_FILES, file_of_folder
from mae_et.checkpoints.weight_files import read_weight_file
from mae_et.errors import UserError, listed
from mae_et.io.plain_files import read_mapping

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
    "head": {"head.*": "classifier.*"},
}
# Our names and theirs that transformers' DINOv2 has beyond its ViT; read, never written.
DINOV2_NAMES = {
    "reg_token": "vit.embeddings.register_tokens",
    "blocks.#.ls1.gamma": "vit.encoder.layer.#.layer_scale1.lambda1",
    "blocks.#.ls2.gamma": "vit.encoder.layer.#.layer_scale2.lambda1",
}
# Maps their names to our part and name.
OURS = {
    theirs: f"{part}/{ours}"
    for part, names in (*NAMES.items(), ("encoder", DINOV2_NAMES))
    for ours, theirs in names.items()
}
# DINOv2's names and ViT's, which differ only in the prefix and the blocks.
DINOV2_RENAMES = (
    (r"^(dinov2(_with_registers)?|ijepa)\.", "vit."),
    (r"(\.layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(\.layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"(\.layer\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(\.layer\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
)
# Tensors that image features do not need; decoder.0 is SimMIM's.
UNUSED = ("vit.pooler.", "vit.embeddings.mask_token", "decoder.0.")
# Prefix of the decoder's blocks in transformers 5; every version reads the older prefix too.
DECODER_BLOCKS_OF_5 = "decoder.decoder_encoder.layer."
THIRDS = ("query", "key", "value")


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a weight file, the shards that an index lists, or a folder with one of these."""
    file = file_of_folder(path) if path.is_dir() else path
    if file is None:
        raise UserError(f"{path} has neither {' nor '.join(WEIGHT_FILES)}, nor an index")
    return _read_shards(file) if file.name.endswith(INDEX) else read_weight_file(file)


def read_with_timm_names(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a folder; those of transformers' ViTs are renamed to timm's names."""
    tensors = read_tensors(folder)
    try:
        encoder, _, head = from_hugging_face(folder, tensors)
    except UserError:  # written by accelerate, with the names of any network
        return tensors
    return encoder | {f"head.{name}": tensor for name, tensor in head.items()}


def from_hugging_face(
    folder: Path, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return encoder (timm's names), decoder (ours) and head of tensors under names on disk.

    Supports ViTMAE, ViT, ViTMSN, I-JEPA (without a class token), and DINOv2 with and without
    registers; parts that the model does not have are empty.
    """
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}, "head": {}}
    for name, tensor in tensors.items():
        spelled = _on_disk(name)
        if spelled.startswith(UNUSED):
            continue
        part, _, ours = _rename(spelled, OURS).partition("/")
        if not ours:
            raise UserError(f"{folder} holds a tensor of unknown name: {name}")
        parts[part][ours] = tensor.float()
    lacking = {"pos_embed", "patch_embed.proj.weight"} - parts["encoder"].keys()
    if lacking:
        theirs = (_rename(name, NAMES["encoder"]) for name in sorted(lacking))
        raise UserError(f"{folder} lacks {', '.join(theirs)}")
    head = {name.removeprefix("head."): tensor for name, tensor in parts["head"].items()}
    return _join_qkv(parts["encoder"]), _join_qkv(parts["decoder"]), head


def to_hugging_face(
    encoder: dict[str, Tensor],
    decoder: dict[str, Tensor] | None = None,
    head: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return tensors of an encoder (timm's names), decoder (ours) or head under the names on disk.

    A ViTMAE's decoder also has `pos_embed` [1 1+N width].
    """
    renamed = {}
    for part, tensors in (("encoder", encoder), ("decoder", decoder), ("head", head)):
        for name, tensor in _split_qkv(tensors or {}).items():
            theirs = _rename(name, NAMES[part])
            if not theirs:
                raise UserError(f"format hf has no place for {name}; use timm")
            renamed[theirs] = tensor
    return renamed


def _read_shards(index: Path) -> dict[str, Tensor]:
    placed = read_mapping(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{index} has no weight_map from tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(name) for name in placed.values()}):
        # Symbolic links may lead outside (the hub's cache uses them), paths may not.
        file = PurePath(name)
        if file.anchor or ".." in file.parts:
            raise UserError(f"{index} is refused: it names {name!r}, outside of its folder")
        if not (index.parent / file).is_file():
            raise UserError(f"{index} names {name!r}, which is not there")
        tensors |= read_weight_file(index.parent / file)
    lacking = sorted(placed.keys() - tensors.keys())
    if lacking:
        # Depth is read from names, so a missing last block would go unnoticed later.
        raise UserError(f"the files of {index} lack {listed(lacking)}")
    return tensors


def _on_disk(name: str) -> str:
    """Return the table's spelling of a name that any model or version wrote."""
    if name.startswith(DECODER_BLOCKS_OF_5):
        return f"decoder.decoder_layers.{name.removeprefix(DECODER_BLOCKS_OF_5)}"
    for theirs, of_vit in DINOV2_RENAMES:
        name = re.sub(theirs, of_vit, name, count=1)
    # A ViTMAEModel or ViTModel alone has no prefix.
    return name if name.startswith(("vit.", "decoder.", "classifier.")) else f"vit.{name}"


def _rename(name: str, table: dict[str, str]) -> str:
    """Translate a name by a table; empty if no entry matches."""
    number = re.search(r"\.(\d+)\.", name)
    leaf = re.search(r"\.(weight|bias)$", name)
    pattern = name.replace(number[0], ".#.", 1) if number else name
    pattern = f"{pattern.removesuffix(leaf[0])}.*" if leaf else pattern
    found = table.get(pattern, "")
    found = found.replace("#", number[1]) if number else found
    return found.replace("*", leaf[1]) if leaf else found


def _split_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split timm's fused qkv into query, key and value, in this order."""
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
                raise UserError(f"the weights lack {', '.join(lacking)}")
            joined[f"{apart[1]}.qkv.{apart[3]}"] = torch.cat([weights[name] for name in names])
    return joined
