"""Reconstruction targets: pixels, normalised pixels, or histograms of oriented gradients (HOG).

B batch, C channels, N = h*w patches of p x q pixels, D numbers per patch.
"""

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from mae_et.config.model import ModelConfig, Target
from mae_et.runtime.precision import full_precision

NORM_PIX_EPSILON = 1e-6
STROKE_GAIN = 2.0


class PatchTarget(ABC):
    """What the decoder predicts of a patch; its size D is `ModelConfig.target_width`."""

    drawing: str | None = None
    """Name of what `picture` shows, if it is not pixels."""

    def __init__(self, config: ModelConfig):
        self.patch = config.patch

    @abstractmethod
    def compute(self, images: Tensor) -> Tensor:
        """Compute the targets of normalised images, float32 [B C H W] -> [B N D]."""

    @abstractmethod
    def picture(self, patches: Tensor, images: Tensor) -> Tensor:
        """Show targets [B N D] of images [B C H W], or a prediction of them.

        Returns:
            Normalised pixels [B C H W], or, if there is a `drawing`, RGB [B 3 H W] in [0, 1].
        """


class Pixels(PatchTarget):
    """The pixels of a patch, ordered row, column, channel."""

    def compute(self, images: Tensor) -> Tensor:
        """Cut images into patches."""
        check_tiled(images, self.patch)
        return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)

    def picture(self, patches: Tensor, images: Tensor) -> Tensor:
        """Put patches together."""
        rows, side = images.shape[-2] // self.patch, self.patch
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=side, q=side)


class NormalisedPixels(Pixels):
    """The pixels of a patch, relative to their mean and standard deviation."""

    def compute(self, images: Tensor) -> Tensor:
        """Cut images into patches, and normalise each."""
        patches = super().compute(images)
        mean, deviation = patch_statistics(patches)
        return (patches - mean) / deviation

    def picture(self, patches: Tensor, images: Tensor) -> Tensor:
        """Restore means and deviations from the images: without them, it is a grey mosaic."""
        mean, deviation = patch_statistics(super().compute(images))
        return super().picture(patches * deviation + mean, images)


class Hog(PatchTarget):
    """Histograms of the cells of a patch, ordered channel, bin, row, column; drawn as strokes."""

    drawing = "HOG"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.cell, self.bins = config.hog_cell, config.hog_bins
        self.cells = self.patch // self.cell  # along each side of a patch

    def compute(self, images: Tensor) -> Tensor:
        """Compute the histograms of images."""
        cells, side = hog(images, self.cell, self.bins), self.cells
        return rearrange(cells, "b c k (h y) (w x) -> b (h w) (c k y x)", y=side, x=side)

    def picture(self, patches: Tensor, images: Tensor) -> Tensor:
        """Draw histograms as strokes along edges."""
        sizes = {"h": images.shape[-2] // self.patch, "y": self.cells, "x": self.cells}
        cells = rearrange(patches, "b (h w) (c k y x) -> b c k (h y) (w x)", k=self.bins, **sizes)
        return hog_strokes(cells, self.cell)


TARGETS: dict[Target, type[PatchTarget]] = {
    "pixel": Pixels, "norm_pix": NormalisedPixels, "hog": Hog,
}  # fmt: skip


def check_tiled(images: Tensor, side: int, what: str = "patches") -> None:
    """Raise a ValueError unless squares of a side tile the images."""
    height, width = images.shape[-2:]
    if height % side or width % side or not height * width:
        raise ValueError(f"images of {height} x {width} pixels are not tiled by {what} of {side}")


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


def hog_strokes(histograms: Tensor, cell: int) -> Tensor:
    """Draw HOG [B C bins h w] as strokes along edges, RGB [B 3 H W] in [0, 1]."""
    strength = reduce(histograms, "b c k h w -> b k h w", "mean")
    # A component shared by all orientations of a cell is uninformative, and dominates uncertain
    # predictions.
    strength = strength - strength.amin(dim=1, keepdim=True)
    strokes = _stroke_masks(histograms.shape[2], cell, histograms.device)
    drawn = torch.einsum("bkhw,kyx->bhwyx", strength, strokes)
    return repeat(STROKE_GAIN * drawn, "b h w y x -> b c (h y) (w x)", c=3).clamp(0, 1)


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
