"""Reconstruction targets: pixels, normalised pixels, or histograms of oriented gradients (HOG).

B batch, C channels, N = h*w patches of p x q pixels, D numbers per patch.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mae_et.config.model import Target
from mae_et.errors import require_choice
from mae_et.runtime.precision import full_precision

NORM_PIX_EPSILON = 1e-6


def patch_targets(kind: Target, images: Tensor, patch: int, cell: int = 8, bins: int = 9) -> Tensor:
    """Return the targets of normalised images [B C H W]: float32 [B N D], without gradient.

    Raises:
        ValueError: the kind is unknown, or the images are not tiled by patches or cells.
    """
    require_choice(kind, Target, "target")
    with torch.no_grad():
        images = images.float()
        if kind == "pixel":
            return patchify(images, patch)
        if kind == "norm_pix":
            patches = patchify(images, patch)
            mean, deviation = patch_statistics(patches)
            return (patches - mean) / deviation
        if patch % cell:
            raise ValueError(f"HOG cells of {cell} pixels do not tile a patch of {patch}")
        return hog_patches(hog(images, cell, bins), patch // cell)


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B C H W] -> [B N D]; the pixels of a patch are ordered row, column, channel."""
    check_tiled(images, patch)
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def check_tiled(images: Tensor, side: int, what: str = "patches") -> None:
    """Raise a ValueError unless squares of a side tile the images."""
    height, width = images.shape[-2:]
    if height % side or width % side or not height * width:
        raise ValueError(f"images of {height} x {width} pixels are not tiled by {what} of {side}")


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """[B N D] -> [B C H W], the inverse of `patchify`."""
    return rearrange(
        patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch
    )


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each patch of [B N D], both [B N 1].

    The standard deviation is sqrt(unbiased variance + 1e-6), as in MAE.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + NORM_PIX_EPSILON).sqrt()


def hog(images: Tensor, cell: int = 8, bins: int = 9) -> Tensor:
    """Compute histograms of oriented gradients as in MaskFeat.

    Source: MaskFeat (Wei et al., CVPR 2022, arXiv 2112.09133). Reflect padding by 1; 3x3 Sobel per
    channel; orientation floor(atan2(gx, gy) / pi * bins) mod bins (unsigned, hard assignment);
    magnitudes summed over square cells; the histogram of each cell and channel divided by its L2
    norm. There is no block normalisation. Computed in float32, also under autocast:
    half precision moves gradients across the edges of bins.

    Args:
        images: normalised images [B C H W]; H and W are multiples of the cell.
        cell: side of a cell, in pixels.
        bins: number of orientations in [0, pi).

    Returns:
        float32 [B C bins H/cell W/cell], in [0, 1]; zero for cells without a gradient.

    Raises:
        ValueError: the images are not tiled by cells, or cell or bins are below 1.
    """
    if cell < 1 or bins < 1:
        raise ValueError(f"cell and bins must be at least 1, got {cell} and {bins}")
    check_tiled(images, cell, "HOG cells")
    with full_precision(images.device):
        gx, gy = _sobel(images.float())
        magnitude = torch.hypot(gx, gy)
        bin_index = (torch.atan2(gx, gy) / torch.pi * bins).floor().long() % bins
        cells = [
            rearrange(x, "b c (h p) (w q) -> b c h w (p q)", p=cell, q=cell)
            for x in (bin_index, magnitude)
        ]
        histogram = torch.zeros(*cells[0].shape[:-1], bins, device=images.device)
        histogram.scatter_add_(-1, *cells)
        return rearrange(F.normalize(histogram, dim=-1), "b c h w k -> b c k h w")


def hog_patches(histograms: Tensor, cells: int) -> Tensor:
    """[B C bins H W] cells -> [B N D], ordered channel, bin, cell row, cell column."""
    return rearrange(histograms, "b c k (h y) (w x) -> b (h w) (c k y x)", y=cells, x=cells)


def hog_cells(patches: Tensor, grid: tuple[int, int], cells: int, bins: int) -> Tensor:
    """[B N D] -> [B C bins H W], the inverse of `hog_patches`."""
    return rearrange(
        patches,
        "b (h w) (c k y x) -> b c k (h y) (w x)",
        h=grid[0],
        w=grid[1],
        k=bins,
        y=cells,
        x=cells,
    )


def _sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the horizontal and vertical gradients of each channel, both [B C H W].

    The kernels are [[1, 0, -1], [2, 0, -2], [1, 0, -1]] and its transpose. Unlike a convolution,
    sums of shifted images are float32 on every device. They are added in the order of the taps,
    because the sign of a sum near zero decides its bin.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    height, width = images.shape[-2:]

    def tap(row: int, column: int) -> Tensor:
        return padded[..., row : row + height, column : column + width]

    gx = (tap(0, 0) - tap(0, 2)).add(tap(1, 0), alpha=2).sub(tap(1, 2), alpha=2)
    gx = gx + tap(2, 0) - tap(2, 2)
    gy = tap(0, 0).add(tap(0, 1), alpha=2) + tap(0, 2) - tap(2, 0)
    gy = gy.sub(tap(2, 1), alpha=2) - tap(2, 2)
    return gx, gy
