"""Optimizers of classifiers, with layer-wise learning rate decay."""

from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.optim import Lamb, Lars, param_groups_layer_decay

from finetune.config import ClassifierOptimConfig
from mae_et.training import optim


def parameter_groups(network: Any, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Group the trainable parameters of a timm model by layer and weight decay, as timm does.

    Biases, norms and the names in the network's `no_weight_decay` (tokens, positions) are not
    decayed. Swin's relative-position biases are, as in EfficientTrain++'s released code.
    `layer_decay` is the learning rate factor from each layer to the one below, 1 turns it off; the
    head and the final norm have the full rate, as in MAE's fine-tuning.

    Returns:
        Groups with `params`, `weight_decay`, `decayed` and, with layer decay, `lr_scale`.

    Source: MAE's fine-tuning (arXiv 2111.06377, appendix A), after BEiT.
    """
    exempt = getattr(network, "no_weight_decay", set[str])()
    if isinstance(network, SwinTransformer):
        exempt = {name for name in exempt if "relative_position_bias" not in name}
    if layer_decay == 1:
        return optim.parameter_groups(network, weight_decay, exempt)
    groups = param_groups_layer_decay(
        network, 1.0, no_weight_decay_list=exempt, layer_decay=layer_decay
    )
    return optim.scale_weight_decay(_with_full_rate_of_final_norm(network, groups), weight_decay)


def build_optimizer(network: Any, config: ClassifierOptimConfig) -> torch.optim.Optimizer:
    """Build the config's optimizer over a network's trainable parameters."""
    groups = parameter_groups(network, config.weight_decay, config.layer_decay)
    if config.optimizer == "lars":
        for group in groups:
            # MAE's LARS adapts the learning rate of matrices, decayed or not, and never of vectors.
            group["always_adapt"] = any(p.ndim > 1 for p in group["params"])
        return Lars(groups, lr=config.lr, momentum=0.9, trust_coeff=0.001)
    if config.optimizer == "lamb":
        return Lamb(groups, lr=config.lr, betas=config.betas, max_grad_norm=config.clip_grad)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def _with_full_rate_of_final_norm(
    network: Any, groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Give the final `norm`, which timm scales like the last block, the head's learning rate."""
    final = {id(p) for name, p in network.named_parameters() if name.startswith("norm.")}
    parts = []
    for group in groups:
        own = [p for p in group["params"] if id(p) in final]
        parts.append(group | {"params": [p for p in group["params"] if id(p) not in final]})
        parts.append(group | {"params": own, "lr_scale": 1.0})
    return parts
