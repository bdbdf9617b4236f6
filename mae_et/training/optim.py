"""AdamW with MAE's parameter groups, and schedules that are pure functions of the compute done."""

import math
from bisect import bisect_right
from collections.abc import Collection
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from mae_et.config.schema import OptimConfig
from mae_et.curriculum.plan import Plan
from mae_et.models.mae import MaskedAutoencoder


def parameter_groups(
    model: nn.Module, weight_decay: float, exempt: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Split trainable parameters as timm does: biases, norms and `exempt` have no weight decay.

    Tokens have three dimensions and are decayed unless exempt, as in MAE's recipe.
    """
    # timm lists the parameters without weight decay first; checkpoints have them last.
    groups = param_groups_weight_decay(model, 1.0, no_weight_decay_list=exempt)[::-1]
    return scale_weight_decay(groups, weight_decay)


def scale_weight_decay(groups: list[dict[str, Any]], weight_decay: float) -> list[dict[str, Any]]:
    """Scale the decays of groups, 1 or 0, and note which are `decayed`; drop empty groups.

    Groups stay distinct although the decay may start at 0.
    """
    return [
        group
        | {
            "decayed": group["weight_decay"] > 0,
            "weight_decay": group["weight_decay"] * weight_decay,
        }
        for group in groups
        if group["params"]
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over a model's trainable parameters, with MAE's parameter groups.

    Args:
        model: model; its parameters with fewer than two dimensions have no weight decay.
        config: `lr`, `betas`, `weight_decay` and `scale_lr_by_decoder_share` are read.
    """
    groups = parameter_groups(model, config.weight_decay)
    if config.scale_lr_by_decoder_share and isinstance(model, MaskedAutoencoder):
        # CrossMAE (arXiv 2401.14391) scales by predicted / masked patches in its release.
        groups = [group | {"lr_scale": model.decoder_share} for group in groups]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def lr_at(progress: float, config: OptimConfig) -> float:
    """Return the learning rate after a fraction `progress` of the compute, in [0, 1].

    Linear from 0 over the warm-up, then half a cosine to `min_lr`; or constant, and linear to
    `min_lr` over the last `decay_fraction` (warm-up, stable, decay: Hägele et al., arXiv
    2405.18392).
    """
    if progress < config.warmup_fraction:
        return config.lr * progress / config.warmup_fraction
    if config.decay_fraction is not None:
        return config.min_lr + (config.lr - config.min_lr) * min(
            1.0, (1 - progress) / config.decay_fraction
        )
    cosine = _half_cosine((progress - config.warmup_fraction) / (1 - config.warmup_fraction))
    return config.min_lr + (config.lr - config.min_lr) * cosine


def decay_start(plan: Plan, config: OptimConfig) -> int | None:
    """Return the number of steps before the learning rate decays; None for a cosine.

    The checkpoint after them is the last from which longer runs can branch off.
    """
    if config.decay_fraction is None:
        return None
    constant_until = 1 - config.decay_fraction
    return bisect_right(range(plan.steps), constant_until, key=plan.progress)


def weight_decay_at(progress: float, config: OptimConfig) -> float:
    """Return the weight decay after a fraction `progress` of the compute, in [0, 1]."""
    if config.weight_decay_end is None:
        return config.weight_decay
    end = config.weight_decay_end
    return end + (config.weight_decay - end) * _half_cosine(progress)


def set_schedule(optimizer: torch.optim.Optimizer, progress: float, config: OptimConfig) -> None:
    """Set the learning rate and weight decay of a step.

    Args:
        optimizer: optimizer that `build_optimizer` returned, or any other. A group's learning rate
            is multiplied by its `lr_scale`, if it has one; its weight decay stays 0 if it was 0
            before the first call.
        progress: fraction of the compute done before the step, in [0, 1] (`Plan.progress(step)`).
        config: schedules; see `OptimConfig`.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr_at(progress, config) * group.get("lr_scale", 1.0)
        if group.setdefault("decayed", group.get("weight_decay", 0) > 0):
            group["weight_decay"] = weight_decay_at(progress, config)


def peak_scale(optimizer: torch.optim.Optimizer) -> float:
    """Return the largest `lr_scale` of the groups: 1 unless all of them are scaled."""
    return max(group.get("lr_scale", 1.0) for group in optimizer.param_groups)


def _half_cosine(fraction: float) -> float:
    """Fall from 1 to 0 as the fraction goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * fraction))
