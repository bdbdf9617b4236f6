"""Draw a masked autoencoder's reconstructions.

A row has P panels: input, masked input, reconstruction, and the reconstruction pasted into the
visible patches. A norm_pix model predicts patches relative to their mean and deviation, which are
restored from the input; without them the image is a grey mosaic. A HOG model predicts gradients,
drawn as oriented strokes: input, masked input, true HOG, and the predicted HOG of hidden patches
pasted into the true HOG of visible ones.
"""

import math
from functools import lru_cache

import torch
from einops import reduce, repeat
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from mae_et.config.data import DataConfig
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.masking import Mask
from mae_et.models.pos_embed import Grid
from mae_et.models.targets import hog, hog_cells, patch_statistics, patchify, unpatchify
from mae_et.monitoring.image_grid import image_grid

CAPTIONS = ("input", "masked", "reconstruction", "pasted")
HOG_CAPTIONS = ("input", "masked", "true HOG", "predicted HOG")
GREY = 0.5
SMALLEST_PANEL = 96  # width in pixels
STROKE_GAIN = 2.0


@torch.no_grad()
def reconstruction_panels(
    model: MaskedAutoencoder, images: Tensor, mask: Mask, data: DataConfig
) -> Tensor:
    """Return panels [B P C H W] in [0, 1] for normalised images [B C H W]."""
    output = model(images, mask, every_patch=True)
    grid = model.grid(images)
    hidden = repeat(
        mask.hidden, "b (h w) -> b 1 (h p) (w q)", h=grid[0], p=model.patch, q=model.patch
    )
    shown = displayable(images, data)
    masked = shown * (1 - hidden) + GREY * hidden
    prediction = output.prediction.float()
    if model.target == "hog":
        cells = model.patch // model.hog_cell
        predicted = hog_cells(prediction, grid, cells, model.hog_bins)
        true = hog(images, model.hog_cell, model.hog_bins)
        hidden_cells = reduce(
            hidden, "b 1 (h p) (w q) -> b 1 1 h w", "max", p=model.hog_cell, q=model.hog_cell
        )
        pasted = true * (1 - hidden_cells) + predicted * hidden_cells
        last = [hog_strokes(cells, model.hog_cell, shown.shape[1]) for cells in (true, pasted)]
    else:
        rebuilt = displayable(_pixels(model, images, prediction, grid), data)
        last = [rebuilt, shown * (1 - hidden) + rebuilt * hidden]
    return torch.stack([shown, masked, *last], dim=1).clamp(0, 1)


def panel_grid(panels: Tensor, target: str) -> Tensor:
    """Lay out panels [B P 3 H W] in [0, 1] as one image [3 H' W'], uint8, one row per input image.

    Columns have captions, which depend on the model's target. Panels narrower than `SMALLEST_PANEL`
    are enlarged by an integer factor.
    """
    factor = max(1, math.ceil(SMALLEST_PANEL / panels.shape[-1]))
    large = repeat(panels.cpu(), "b p c h w -> b p c (h y) (w x)", y=factor, x=factor)
    captions = HOG_CAPTIONS if target == "hog" else CAPTIONS
    pixels = (large * 255).round().to(torch.uint8)
    return image_grid([[to_pil_image(panel) for panel in row] for row in pixels], captions)


def hog_strokes(histograms: Tensor, cell: int, channels: int = 3) -> Tensor:
    """Draw HOG [B C bins h w] as strokes along edges, [B channels H W] in [0, 1]."""
    strength = reduce(histograms, "b c k h w -> b k h w", "mean")
    # A component shared by all orientations of a cell is uninformative, and dominates uncertain
    # predictions.
    strength = strength - strength.amin(dim=1, keepdim=True)
    strokes = _stroke_masks(histograms.shape[2], cell, histograms.device)
    drawn = torch.einsum("bkhw,kyx->bhwyx", strength, strokes)
    return repeat(STROKE_GAIN * drawn, "b h w y x -> b c (h y) (w x)", c=channels).clamp(0, 1)


@lru_cache(maxsize=8)
def _stroke_masks(bins: int, cell: int, device: torch.device) -> Tensor:
    """Return a line through the cell's centre for each orientation, [bins cell cell]."""
    offsets = torch.arange(cell, device=device) - (cell - 1) / 2
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    angles = (torch.arange(bins, device=device) + 0.5) / bins * math.pi
    # Orientation is atan2(gx, gy): at angle a the gradient points along (sin a, cos a), the edge
    # along (cos a, -sin a).
    distance = x * angles.sin()[:, None, None] + y * angles.cos()[:, None, None]
    return (1 - distance.abs()).clamp(min=0)


def _pixels(model: MaskedAutoencoder, images: Tensor, prediction: Tensor, grid: Grid) -> Tensor:
    if model.target == "norm_pix":
        mean, deviation = patch_statistics(patchify(images, model.patch))
        prediction = prediction * deviation + mean
    return unpatchify(prediction, grid, model.patch)


def displayable(images: Tensor, data: DataConfig) -> Tensor:
    """Undo the normalisation of images [B C H W], and return them as RGB [B 3 H W]."""
    mean, std = torch.tensor([data.mean, data.std], device=images.device)[..., None, None]
    return as_rgb(images * std + mean)


def as_rgb(images: Tensor) -> Tensor:
    """Return the first three channels of images [B C H W], or the only one three times."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
