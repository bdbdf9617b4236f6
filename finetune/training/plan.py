"""Resolve a classifier's curriculum: image sizes, their steps, and their cost."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from finetune.config import ClassifierConfig
from finetune.image_size import Size, check_tiles, format_size, height_and_width, size_at_bandwidth
from mae_et.curriculum.flops import training_flops
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.schedule import Curriculum
from mae_et.errors import UserError, one_line

EMBEDS = ("patch_embed", "encoder.patch_embed", "embeds")
"""Patch embeddings of ViTs, of classifiers around the tower of a language model, of NaFlexViT."""


def make_plan(config: ClassifierConfig, network: nn.Module, images: int) -> Plan:
    """Resolve the curriculum for a number of training images."""
    size = config.model.image_size
    patch = size_multiple(network, size)
    check_tiles(size, patch, "model.image_size")
    curriculum = Curriculum.from_config(config.curriculum, min(height_and_width(size)), patch)
    check_sizes(config, network, [stage.bandwidth for stage in curriculum.stages])
    cost = image_cost(config, network)
    return curriculum.plan(config.curriculum.epochs, images, config.optim.batch_size, cost)


def image_cost(config: ClassifierConfig, network: nn.Module) -> Callable[[int], float]:
    """Return a function from a bandwidth to the cost of one image: FLOPs, or pixels."""
    shown = shown_sides(config.model.image_size, network)
    if config.curriculum.cost == "flops":
        return training_flops(_on_meta(network), config.model.channels, shown)
    return lambda bandwidth: float(math.prod(shown(bandwidth)))


def shown_sides(size: Size, network: nn.Module) -> Callable[[int], tuple[int, int]]:
    """Return a function from a bandwidth to the height and width of the network's input."""
    return partial(size_at_bandwidth, size, patch=size_multiple(network, size))


def size_multiple(network: nn.Module, image_size: Size) -> int:
    """Return the number that image sizes must be multiples of: a ViT's patch, else the stride."""
    embed: Any = next((part for name, part in network.named_modules() if name in EMBEDS), None)
    # timm's non-overlapping patch embeddings have a ratio; a hybrid's includes its convolutions.
    ratio = embed.feat_ratio() if hasattr(embed, "feat_ratio") else None
    strides = [each["reduction"] for each in getattr(network, "feature_info", [])]
    if ratio is not None and ratio == max(strides, default=ratio):
        return int(ratio)
    # The strides of hierarchical networks range from 4 to 32.
    return 32 if all(side % 32 == 0 for side in height_and_width(image_size)) else 1


def check_sizes(config: ClassifierConfig, network: nn.Module, bandwidths: Sequence[int]) -> None:
    """Refuse a network that fails, on the meta device, at an image size of the curriculum."""
    shown, dry = shown_sides(config.model.image_size, network), _on_meta(network)
    full = height_and_width(config.model.image_size)
    for size in sorted({full, *map(shown, bandwidths)}, reverse=True):
        try:
            with torch.no_grad():
                dry(torch.empty(1, config.model.channels, *size, device="meta"))
        except Exception as error:
            advice = ""
            if size != full:  # of the many networks of one size, such as BEiT, MaxViT and Hiera
                advice = f"; with --curriculum.preset constant all have {format_size(full)}"
            raise UserError(
                f"the network does not accept the curriculum's images of {format_size(size)} "
                f"pixels{advice} ({one_line(error)})"
            ) from error


def _on_meta(network: nn.Module) -> nn.Module:
    # PyTorch's FLOP counter fails on expanded tokens that require gradients.
    return copy.deepcopy(network).to("meta").eval().requires_grad_(False)
