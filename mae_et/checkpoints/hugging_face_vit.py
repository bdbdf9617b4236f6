"""Encoders of Hugging Face folders, under timm's names: ViT, DINOv2, and DINOv2 with registers.

ViTMAE folders, which may have a decoder, are read by `hugging_face.py`.

Source: the `vit`, `dinov2` and `dinov2_with_registers` models of transformers.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from mae_et.checkpoints.hugging_face import read_tensors
from mae_et.checkpoints.state_dicts import Tensors
from mae_et.checkpoints.weight_files import read_weight_file
from mae_et.errors import UserError
from mae_et.io.plain_files import read_mapping

MODEL_TYPES = ("vit", "dinov2", "dinov2_with_registers")
PREFIX = re.compile(r"^(vit|dinov2|dinov2_with_registers)\.")  # of models with a head
RENAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("layernorm.", "norm."),
    ("encoder.layer.", "blocks."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.attention.", ".attn."),
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
)


@dataclass(frozen=True)
class HuggingFaceViT:
    """A folder's encoder."""

    tensors: Tensors
    """timm's names."""
    head: Tensors
    """A classifier's weight and bias; empty without one."""
    num_heads: int
    """Attention heads."""
    norm_eps: float
    """Epsilon of the layer norms."""
    classes: tuple[str, ...]
    """Names of the classifier's outputs; empty without a classifier."""


def is_hugging_face_vit(path: Path) -> bool:
    """Return whether a path is a folder of one of `MODEL_TYPES`."""
    description = path / "config.json"
    return description.is_file() and read_mapping(description).get("model_type") in MODEL_TYPES


def read_hugging_face_vit(folder: Path) -> HuggingFaceViT:
    """Read a folder that `save_pretrained` wrote.

    Raises:
        UserError: the model differs from a ViT in more than its sizes, or tensors are missing.
    """
    description = read_mapping(folder / "config.json")
    if description.get("hidden_act", "gelu") != "gelu" or description.get("use_swiglu_ffn"):
        raise UserError(f"{folder} has another MLP than a plain ViT: give its timm model instead")
    encoder: Tensors = {}
    head: Tensors = {}
    for name, tensor in read_tensors(folder, read_weight_file).items():
        own = PREFIX.sub("", name)
        if own.startswith("classifier."):
            head[own.removeprefix("classifier.")] = tensor
        elif not own.startswith(("pooler.", "embeddings.mask_token")):
            encoder[_rename(own)] = tensor
    labels = description.get("id2label") or {}
    return HuggingFaceViT(
        _join_qkv(folder, encoder),
        head,
        int(description["num_attention_heads"]),
        float(description.get("layer_norm_eps", 1e-12)),
        tuple(str(labels[key]) for key in sorted(labels, key=int)) if head else (),
    )


def _rename(name: str) -> str:
    for theirs, ours in RENAMES:
        if name.startswith(theirs) or (theirs.startswith(".") and theirs in name):
            name = name.replace(theirs, ours, 1)
    return name


def _join_qkv(folder: Path, tensors: Tensors) -> Tensors:
    """Join query, key and value, which transformers keeps apart."""
    joined: Tensors = {}
    for name, tensor in tensors.items():
        part = re.fullmatch(r"(.*\.attn)\.(query|key|value)\.(\w+)", name)
        if part is None:
            joined[name] = tensor
        elif part[2] == "query":
            names = [f"{part[1]}.{third}.{part[3]}" for third in ("query", "key", "value")]
            missing = [third for third in names if third not in tensors]
            if missing:
                raise UserError(f"{folder} lacks {', '.join(missing)}")
            joined[f"{part[1]}.qkv.{part[3]}"] = torch.cat([tensors[third] for third in names])
    return joined
