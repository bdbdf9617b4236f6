"""Build a classifier's network: a ViT around a checkpoint's encoder, or any timm backbone."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from finetune.config import NetworkConfig
from finetune.training.backbone import build_backbone, report_kept_head
from finetune.training.vit import build_vit, keeps_head
from mae_et.checkpoints.formats import load_weights, weights_of_classifier
from mae_et.checkpoints.run_config import read_classifier_description
from mae_et.checkpoints.state_dicts import describe_mismatch
from mae_et.errors import UserError


def build_classifier(config: NetworkConfig, classes: int) -> nn.Module:
    """Build a config's network for a number of classes."""
    if config.backbone is not None:
        return build_backbone(config, classes)
    assert config.checkpoint is not None  # NetworkConfig requires one of the two
    weights = load_weights(config.checkpoint, config.checkpoint_key)
    network = build_vit(config, weights, classes)
    if keeps_head(network, weights):
        report_kept_head(config.checkpoint, weights.classes or (), classes)
    return network


def load_run_network(config: NetworkConfig, folder: Path, tensors: dict[str, Tensor]) -> nn.Module:
    """Build a run's network from its own weights; its initial checkpoint may be gone.

    The folder's classes.json records the classes, heads and grid.
    """
    described = read_classifier_description(folder)
    classes = len(described["classes"])
    if config.backbone is not None:
        own = replace(config, pretrained=False, checkpoint=None)
        network = build_backbone(own, classes, described.get("backbone"))
    else:
        network = build_vit(config, weights_of_classifier(folder, tensors), classes)
    mismatch = describe_mismatch(tensors, network.state_dict())
    if mismatch:
        raise UserError(f"the weights of {folder} do not fit: {mismatch}")
    network.load_state_dict(tensors)
    return network
