"""Draw the first three principal components of patch features (`mae-et preview --features`).

As in DINOv2 (arXiv 2304.07193, figure 1): components are computed over the patches of all images,
so patches with similar features have similar colours across images.

Shapes: B images, h w grid of patches, N = B h w patches, D width.
"""

from dataclasses import replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Subset

from finetune.feature_config import FeatureMapConfig
from finetune.probing.features import encode_images
from finetune.probing.frozen_encoder import open_encoder_and_data
from mae_et.config.data import check_statistics
from mae_et.data.datasets import ImageDataset, open_dataset
from mae_et.data.sources.image_folder import open_image_files
from mae_et.data.transforms import EvalDataset
from mae_et.io.atomic import refuse_unwritable
from mae_et.monitoring.image_grid import as_panel, image_grid, save_png
from mae_et.monitoring.reconstructions import as_rgb
from mae_et.runtime.distributed import choose_device

PANEL = 224
QUANTILES = 0.01, 0.99
"""Quantiles of a component drawn black and at full brightness, robust to a few outliers."""


@torch.no_grad()
def draw_feature_maps(config: FeatureMapConfig) -> Path:
    """Write a PNG of images beside their patch features, and return its path."""
    encoder, data = open_encoder_and_data(config, needs_images=not config.images)
    check_statistics(data, encoder.channels)
    source: ImageDataset
    if config.images:  # the user's own keep their whole shorter side, as in mae-et reconstruct
        source = open_image_files(config.images, encoder.channels, data.max_value)
        data = replace(data, eval_crop=1.0)
    else:
        source = open_dataset(data, "val", encoder.channels)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(source), generator=generator)[: config.count].sort().values.tolist()
    views = Subset(EvalDataset(source, data, encoder.image_size), chosen)
    device = choose_device(config.device)
    prefix = encoder.network.num_prefix_tokens
    with encode_images(encoder, views, data, config, device, [config.layer]) as batches:
        tokens = torch.cat([found[0, :, prefix:] for found, _ in batches])
    height, width = (side // encoder.patch for side in encoder.image_size)
    features = rearrange(tokens.cpu(), "b (h w) d -> b h w d", h=height, w=width)
    maps = feature_colours(features, config.foreground)
    panels = []
    for place, colours in enumerate(maps):
        pixels, _ = views[place]
        shown = as_rgb(pixels[None])[0] / (1 if pixels.is_floating_point() else 255)
        panels += [as_panel(shown, PANEL), as_panel(colours, PANEL)]
    pairs = 2 if len(chosen) > 1 else 1
    rows = [panels[start : start + 2 * pairs] for start in range(0, len(panels), 2 * pairs)]
    with refuse_unwritable(f"save {config.save}"):
        save_png(config.save, image_grid(rows, ("image", "features") * pairs, frame=8))
    return config.save


def feature_colours(features: Tensor, foreground: bool = False) -> Tensor:
    """Return the first three principal components of patch features as RGB.

    Args:
        features: float [B h w D], D >= 3.
        foreground: see `FeatureMapConfig`.

    Returns:
        [B 3 h w] in [0, 1]; patches outside the foreground are white.
    """
    count, height, width, _ = features.shape
    flat = rearrange(features, "b h w d -> (b h w) d").double()
    flat = flat / flat.abs().max().clamp(min=torch.finfo(flat.dtype).tiny)
    shown = torch.ones(len(flat), dtype=torch.bool)
    if foreground:
        shown = _near_centre(principal_components(flat, 1)[:, 0] > 0, count, height, width)
    components = principal_components(flat[shown], 3)
    low, high = torch.quantile(components, torch.tensor(QUANTILES, dtype=flat.dtype), dim=0)
    colours = torch.ones(len(flat), 3, dtype=flat.dtype)
    colours[shown] = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return rearrange(colours.float(), "(b h w) c -> b c h w", h=height, w=width)


def principal_components(points: Tensor, count: int) -> Tensor:
    """Project points [N D] on their first components, [N count].

    Signs, which are arbitrary, are fixed: the largest entry of each component is positive.
    """
    centred = points - points.mean(dim=0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # in ascending order
    axes = axes.flip(1)[:, :count]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return centred @ (axes * largest.sign())


def _near_centre(part: Tensor, count: int, height: int, width: int) -> Tensor:
    """Return a subset of the patches, bool [N], or its complement, whichever is more central."""
    y = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width).expand(height, width)
    distance = (x.square() + y.square()).flatten().repeat(count)
    return part if distance[part].mean() <= distance[~part].mean() else ~part
