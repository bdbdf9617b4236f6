"""Load a trained classifier: a run's, a released one's, timm's, or Hugging Face's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.config import ClassifierConfig
from finetune.image_size import Size, check_tiles, height_and_width, patch_side
from finetune.scoring_config import ClassifierUseConfig
from finetune.training.model import load_run_network
from mae_et.checkpoints.encoders import build_named, build_vit_of
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.layouts.timm_config import (
    timm_arguments,
    timm_classes,
    timm_preprocessing,
)
from mae_et.checkpoints.layouts.timm_hub import fetch_from_hub
from mae_et.checkpoints.run_config import read_classifier_description
from mae_et.checkpoints.source import recognise
from mae_et.checkpoints.weight_files import read_weight_file
from mae_et.checkpoints.weights import Weights
from mae_et.errors import UserError


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier, and the settings that evaluation needs."""

    network: Any
    """From normalised images [B C H W] to logits [B classes]."""
    image_size: Size
    """Side of the images in pixels, or (height, width)."""
    channels: int
    """Image channels."""
    classes: Sequence[str] | None = None
    """Names of the classes, if they are recorded."""


def load_classifier(config: ClassifierUseConfig, run: ClassifierConfig | None) -> TrainedClassifier:
    """Load the classifier that a config names."""
    path = config.checkpoint
    if run is not None:
        names = {"last": "model.safetensors", "best": "best.safetensors"}
        tensors = read_weight_file(path / names[config.weights])
        network = load_run_network(run.model, path, tensors)
        classes = read_classifier_description(path)["classes"]
        return TrainedClassifier(network, run.model.image_size, run.model.channels, classes)
    source = recognise(path, config.checkpoint_key, config.architecture)
    if source.architecture is not None:
        network = build_named(source, head=True)
        recorded = timm_preprocessing(path)
        classifier = _of_timm(config, network, recorded.image_size if recorded else None)
        channels = timm_arguments(path, source.architecture).get("in_chans", classifier.channels)
        return replace(classifier, channels=channels, classes=timm_classes(path))
    if source.kind == "name":
        return _of_timm(config, fetch_from_hub(str(path)))
    weights = load_weights(path, config.checkpoint_key).with_given(config.encoder_num_heads)
    return _of_weights(config, weights)


def _of_timm(
    config: ClassifierUseConfig, network: Any, recorded: Size | None = None
) -> TrainedClassifier:
    """Use a timm model at its own image size, unless another is given.

    A network that takes any size is used at the recorded one, else at that which timm publishes.
    """
    channels, height, width = network.default_cfg["input_size"]
    own = getattr(getattr(network, "patch_embed", None), "img_size", None)
    own = own or height_and_width(recorded or (height, width))
    if config.image_size is not None and hasattr(network, "set_input_size"):
        check_tiles(config.image_size, patch_side(network.patch_embed), "image_size")
        network.set_input_size(img_size=config.image_size)
    return TrainedClassifier(network, config.image_size or tuple(own), channels)


def _of_weights(config: ClassifierUseConfig, weights: Weights) -> TrainedClassifier:
    """Build the ViT of weights, including registers, LayerScale and the like if present."""
    if not {"weight", "bias"} <= set(weights.head):
        raise UserError(f"{config.checkpoint} is not a classifier: it has no head")
    _, channels, patch, _ = weights.encoder["patch_embed.proj.weight"].shape
    if weights.grid is None and config.image_size is not None:
        grid = [side // patch for side in height_and_width(config.image_size)]
        if math.prod(grid) == weights.encoder["pos_embed"].shape[1] - 1:  # and may not be square
            weights = replace(weights, grid=grid)
    classifier = _of_timm(config, build_vit_of(weights, head=True))
    return replace(classifier, channels=channels, classes=weights.classes)
