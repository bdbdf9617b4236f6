"""Optimizers of classifiers, with a learning rate that falls from layer to layer."""

from typing import Any

import torch
from timm.optim import Lamb, Lars, param_groups_layer_decay

from finetune.config import ClassifierOptimConfig


def parameter_groups(network: Any, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Group trainable parameters by layer and decay, as MAE's fine-tuning does.

    Biases, norms and what the network names (`no_weight_decay`: tokens, positions) are not decayed.

    Args:
        network: a timm model.
        weight_decay: of the parameters that are decayed.
        layer_decay: factor of the learning rate from a layer to the one below; 1 for none.

    Returns:
        Groups with `lr_scale`, `weight_decay` and `decayed`.
    """
    exempt = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    if layer_decay < 1:
        groups = param_groups_layer_decay(
            network, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay
        )
    else:
        named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        plain = {n for n, p in named if p.ndim <= 1 or n in exempt}
        groups = [
            {"params": [p for n, p in named if n not in plain], "weight_decay": weight_decay},
            {"params": [p for n, p in named if n in plain], "weight_decay": 0.0},
        ]
    return [
        group | {"decayed": any(p.ndim > 1 for p in group["params"]) and group["weight_decay"] > 0}
        for group in groups
        if group["params"]
    ]


def build_optimizer(network: Any, config: ClassifierOptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer that a config names, over a network's trainable parameters."""
    groups = parameter_groups(network, config.weight_decay, config.layer_decay)
    if config.optimizer == "lars":
        for group in groups:
            # Products adapt their rate also where nothing is decayed, biases and norms never.
            group["always_adapt"] = any(p.ndim > 1 for p in group["params"])
        return Lars(groups, lr=config.lr, momentum=0.9, trust_coeff=0.001)
    if config.optimizer == "lamb":
        return Lamb(groups, lr=config.lr, betas=config.betas, max_grad_norm=config.clip_grad)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
