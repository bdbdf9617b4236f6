"""Read the model, classes and preprocessing that a Hugging Face folder describes."""

import math
import re
from pathlib import Path
from typing import Any

from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.errors import UserError
from mae_et.io.plain_files import read_mapping

MODEL_TYPES = {
    "vit_mae": 1e-12, "vit": 1e-12, "vit_msn": 1e-6, "ijepa": 1e-12,
    "dinov2": 1e-6, "dinov2_with_registers": 1e-6,
}  # fmt: skip
"""Models that are read, with transformers' default epsilon of their layer norms."""
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weight files of a folder, in the order in which transformers and timm look for them."""
INDEX = ".index.json"
"""Suffix of the index of a file that is saved in shards."""
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
"""timm's names of transformers' activations."""
NUMBERS: dict[str, tuple[type, ...]] = {
    "num_attention_heads": (int,), "decoder_num_attention_heads": (int,),
    "layer_norm_eps": (int, float),
}  # fmt: skip
"""Entries of a `config.json` that are used as positive numbers, with their types."""


def folder_of(path: Path) -> Path:
    """Return the folder that transformers saved, of a weight file in it; other paths unchanged.

    Raises:
        UserError: the `config.json` beside the file cannot be read, or the file is one shard.
    """
    if re.search(r"-\d{5}-of-(?!00001)\d{5}\.", path.name) and path.is_file():
        raise UserError(f"{path} is one of several files: give their folder")
    file = path.parent / "config.json"
    is_weights = path.name.removesuffix(INDEX) in WEIGHT_FILES and path.is_file()
    is_theirs = is_weights and file.is_file() and "model_type" in read_mapping(file)
    return path.parent if is_theirs else path


def file_of_folder(folder: Path) -> Path | None:
    """Return the weight file of transformers or accelerate, or the index of its shards, if any."""
    files = [folder / f"{name}{index}" for name in WEIGHT_FILES for index in ("", INDEX)]
    return next((file for file in files if file.is_file()), None)


def read_description(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a folder."""
    about = read_mapping(folder / "config.json")
    kind = about.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{folder} holds a {kind!r} model, not {' or '.join(MODEL_TYPES)}")
    if about.get("use_swiglu_ffn"):
        raise UserError(f"{folder} has another MLP than a plain ViT: give its timm model instead")
    if own := activation_of(about, folder):
        raise UserError(
            f"{folder} has the activation {own['act_layer']}: give its timm model with "
            "--architecture (of embed, knn, linear-probe and evaluate), which keeps it"
        )
    for key, types in NUMBERS.items():
        if key in about and not (type(about[key]) in types and 0 < about[key] < math.inf):
            raise UserError(f"{folder}/config.json is damaged: {key} is {about[key]!r}")
    return about


def norm_eps_of(about: dict[str, Any]) -> float | None:
    """Return the epsilon of layer norms that transformers describes; None for other models."""
    given = about.get("layer_norm_eps", MODEL_TYPES.get(str(about.get("model_type"))))
    return float(given) if isinstance(given, int | float) and given > 0 else None


def activation_of(about: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return timm's argument for the activation that transformers describes; empty for GELU."""
    name = str(about.get("hidden_act", "gelu") if "model_type" in about else "gelu")
    if name not in ACTIVATIONS:
        raise UserError(f"{path} has the activation {name!r}, not {' or '.join(ACTIVATIONS)}")
    own = ACTIVATIONS[name]
    return {} if own == "gelu" else {"act_layer": own}


def read_preprocessor(folder: Path) -> Preprocessing | None:
    """Return the preprocessing in a folder's `preprocessor_config.json`; None without one."""
    path = folder / "preprocessor_config.json"
    return Preprocessing.of_hugging_face(read_mapping(path), path) if path.is_file() else None


def grid_of(about: dict[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of patches of a rectangular image size; None for a square."""
    size, patch = about.get("image_size"), about.get("patch_size", 16)
    if not isinstance(size, list) or [type(side) for side in (*size, patch)] != [int] * 3:
        return None
    return size[0] // max(patch, 1), size[1] // max(patch, 1)


def numbered_names(names: object) -> list[str] | None:
    """Return the names of a mapping from "0", "1", ... in order; None for anything else.

    transformers' placeholders `LABEL_0`, `LABEL_1`, ... do not count as names.
    """
    if not isinstance(names, dict) or not all(str(n) in names for n in range(len(names))):
        return None
    found = [str(names[str(number)]) for number in range(len(names))]
    return None if all(name.startswith("LABEL_") for name in found) else found
