"""Draw a masked autoencoder's reconstructions.

A row has P panels: input, masked input, reconstruction, and the reconstruction pasted into the
visible patches. Of a target that is drawn instead, as HOG is by strokes, the last two are the true
drawing, and the predicted one of hidden patches pasted into the true one of visible patches.
"""

import math

import torch
from einops import repeat
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from mae_et.config.data import DataConfig
from mae_et.config.model import Target
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.masking import Mask
from mae_et.models.targets import TARGETS
from mae_et.monitoring.image_grid import image_grid

GREY = 0.5
SMALLEST_PANEL = 96  # width in pixels


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
    picture = model.patch_target.picture
    predicted = picture(output.prediction.float(), images)
    if model.patch_target.drawing:
        true = third = picture(model.targets(images), images)
    else:
        true, predicted = shown, displayable(predicted, data)
        third = predicted
    pasted = true * (1 - hidden) + predicted * hidden
    return torch.stack([shown, masked, third, pasted], dim=1).clamp(0, 1)


def panel_grid(panels: Tensor, target: Target) -> Tensor:
    """Lay out panels [B P 3 H W] in [0, 1] as one image [3 H' W'], uint8, one row per input image.

    Columns have captions, which depend on the model's target. Panels narrower than `SMALLEST_PANEL`
    are enlarged by an integer factor.
    """
    factor = max(1, math.ceil(SMALLEST_PANEL / panels.shape[-1]))
    large = repeat(panels.cpu(), "b p c h w -> b p c (h y) (w x)", y=factor, x=factor)
    drawing = TARGETS[target].drawing
    last = (f"true {drawing}", f"predicted {drawing}") if drawing else ("reconstruction", "pasted")
    pixels = (large * 255).round().to(torch.uint8)
    rows = [[to_pil_image(panel) for panel in row] for row in pixels]
    return image_grid(rows, ("input", "masked", *last))


def displayable(images: Tensor, data: DataConfig) -> Tensor:
    """Undo the normalisation of images [B C H W], and return them as RGB [B 3 H W]."""
    mean, std = torch.tensor([data.mean, data.std], device=images.device)[..., None, None]
    return as_rgb(images * std + mean)


def as_rgb(images: Tensor) -> Tensor:
    """Return the first three channels of images [B C H W], or the only one three times."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
