"""Add the settings that were recorded with weights, by mae-et or timm."""

import json
import math
from dataclasses import fields, replace
from typing import Any

from mae_et.checkpoints.layouts.timm_config import (
    read_timm_config,
    refuse_traceless,
    timm_arguments,
    timm_classes,
    timm_preprocessing,
)
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.checkpoints.run_config import check_classifier_description
from mae_et.checkpoints.weight_files import (
    CLASSIFIER_KEY,
    MODEL_KEY,
    PREPROCESSING_KEY,
    SETTINGS_KEY,
)
from mae_et.checkpoints.weights import Weights
from mae_et.config.model import ModelConfig, Target
from mae_et.errors import listed, require


def with_mae_arguments(weights: Weights, payload: dict[str, Any]) -> Weights:
    """Add the target in the arguments that facebookresearch/mae's training saves."""
    norm_pix = getattr(payload.get("args"), "norm_pix_loss", None)
    target: Target = "norm_pix" if norm_pix else "pixel"
    return replace(weights, target=target) if isinstance(norm_pix, bool) else weights


def with_timm_config(weights: Weights, payload: dict[str, Any]) -> Weights:
    """Add the settings in timm's `config.json` beside the file, or from timm's train.py in it."""
    name = read_timm_config(weights.path).get("architecture")
    arguments = timm_arguments(weights.path, name)
    size = arguments.get("img_size")
    if name is None and isinstance(payload.get("arch"), str):
        given = payload.get("args")
        name, options = payload["arch"], getattr(given, "model_kwargs", None)
        arguments = dict(options) if isinstance(options, dict) else {}
        size = arguments.get("img_size")
        if size is None and isinstance(whole := getattr(given, "input_size", None), list | tuple):
            size = whole[1:]  # without the channels; other trainers record a number
    refuse_traceless(weights.path, arguments)
    weights = weights.with_blocks_of(name, arguments)
    classes = timm_classes(weights.path) if weights.head else None
    preprocessing = timm_preprocessing(weights.path)
    grid = _grid_of(weights, size)
    return replace(weights, preprocessing=preprocessing, classes=classes, grid=grid)


def _grid_of(weights: Weights, size: Any) -> list[int] | None:
    """Return the grid of a recorded [height, width]; None if the positions are of another."""
    if [type(side) for side in (size if isinstance(size, list | tuple) else ())] != [int, int]:
        return None
    patch = weights.encoder["patch_embed.proj.weight"].shape[2:]
    grid = [side // of for side, of in zip(size, patch, strict=True)]
    beside = weights.encoder["pos_embed"].shape[1] - math.prod(grid)
    return grid if 0 <= beside <= int("cls_token" in weights.encoder) else None


def with_our_entries(weights: Weights, payload: dict[str, Any]) -> Weights:
    """Add the settings that our own files record beside the weights."""
    if SETTINGS_KEY in payload:
        weights = weights.with_settings(payload[SETTINGS_KEY])
    if PREPROCESSING_KEY in payload:
        preprocessing = Preprocessing.from_json(payload[PREPROCESSING_KEY], weights.path)
        weights = replace(weights, preprocessing=preprocessing)
    if CLASSIFIER_KEY in payload:
        description = json.loads(payload[CLASSIFIER_KEY])
        weights = with_classifier(weights, check_classifier_description(description, weights.path))
    if MODEL_KEY in payload:
        entries = json.loads(payload[MODEL_KEY])
        unknown = sorted(entries.keys() - {field.name for field in fields(ModelConfig)})
        require(
            not unknown,
            f"{weights.path} was written by another version of mae-et: there is no key "
            f"{listed([f'model.{key}' for key in unknown], 3)}",
        )
        model = ModelConfig(**entries)
        weights = replace(weights, model=model, architecture=model.encoder)
    return weights


def with_classifier(weights: Weights, description: dict[str, Any]) -> Weights:
    """Add the settings in a classifier run's `classes.json`."""
    if "preprocessing" in description:
        preprocessing = Preprocessing.from_dict(description["preprocessing"], weights.path)
        weights = replace(weights, preprocessing=preprocessing)
    return replace(
        weights,
        architecture=description["encoder"],
        encoder_num_heads=description["encoder_num_heads"],
        grid=description.get("grid"),
        norm_eps=description.get("norm_eps") or weights.norm_eps,
        classes=description["classes"],
    )
