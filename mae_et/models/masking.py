"""Random masks from noise: the patches with the least noise stay visible (MAE, arXiv 2111.06377).

B batch, N patches, V visible patches = floor(N * (1 - mask ratio)).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mae_et.config.model import visible_patches


class Mask(NamedTuple):
    """Which patches are visible to the encoder."""

    order: Tensor
    """int64 [B N]: patch indices in ascending order of noise; the first V are visible."""
    visible: int
    """V, the number of visible patches."""

    @property
    def keep(self) -> Tensor:
        """int64 [B V]: indices of the visible patches."""
        return self.order[:, : self.visible]

    @property
    def restore(self) -> Tensor:
        """int64 [B N]: position of each patch in `order`, its inverse permutation."""
        places = torch.arange(self.order.shape[1], device=self.order.device)
        return torch.empty_like(self.order).scatter(1, self.order, places.expand_as(self.order))

    @property
    def hidden(self) -> Tensor:
        """float32 [B N]: 1 if a patch is masked, 0 if it is visible."""
        everywhere = torch.ones(self.order.shape, device=self.order.device)
        return everywhere.scatter(1, self.keep, 0.0)


def mask_from_noise(noise: Tensor, mask_ratio: float) -> Mask:
    """Return the mask that keeps the V smallest entries of each row of noise [B N] visible.

    `mask_from_noise(torch.rand(B, N), 0.75)` is MAE's random mask.

    Raises:
        ValueError: the noise is not [B N], or no patch or every patch would stay visible.
    """
    if noise.ndim != 2:  # N would be the columns of a grid
        raise ValueError(f"noise must be [B N], got shape {list(noise.shape)}")
    visible = visible_patches(noise.shape[1], mask_ratio)
    return Mask(noise.argsort(dim=1, stable=True), visible)
