"""A classifier's ViT, around loaded weights."""

from typing import Any

from timm.models.vision_transformer import VisionTransformer

from finetune.config import NetworkConfig
from finetune.image_size import Size
from finetune.training.vit import build_vit
from mae_et.checkpoints.weights import Weights


def vit_of(weights: Weights, classes: int, image_size: Size, **settings: Any) -> VisionTransformer:
    config = NetworkConfig(weights.path, image_size=image_size, **settings)
    return build_vit(config, weights, classes)
