"""Random masks from noise: the patches with the least noise are kept (MAE, arXiv 2111.06377).

B batch, N patches, V visible patches = floor(N * (1 - mask ratio)).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """Which patches an encoder sees."""

    order: Tensor
    """int64 [B N]: indices of the patches in rising order of noise; the first V are visible."""
    visible: int
    """V."""

    @property
    def keep(self) -> Tensor:
        """int64 [B V]: indices of the visible patches."""
        return self.order[:, : self.visible]

    @property
    def restore(self) -> Tensor:
        """int64 [B N]: place of each patch in the order "visible, then hidden"."""
        places = torch.arange(self.order.shape[1], device=self.order.device)
        return torch.empty_like(self.order).scatter_(1, self.order, places.expand_as(self.order))

    @property
    def hidden(self) -> Tensor:
        """float32 [B N]: 1 where a patch is hidden, 0 where it is visible."""
        everywhere = torch.ones(self.order.shape, device=self.order.device)
        return everywhere.scatter_(1, self.keep, 0.0)


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Return how many of N patches stay visible.

    Raises:
        ValueError: none would stay visible, or none would be hidden.
    """
    visible = int(patches * (1 - mask_ratio))
    if not 0 < visible < patches:
        raise ValueError(
            f"a mask ratio of {mask_ratio} leaves {visible} of {patches} patches visible; at least "
            "one must be visible and one hidden"
        )
    return visible


def mask_from_noise(noise: Tensor, mask_ratio: float) -> Mask:
    """Return the mask that keeps, in each row of noise [B N], the V smallest entries.

    Raises:
        ValueError: see `visible_patches`.
    """
    visible = visible_patches(noise.shape[1], mask_ratio)
    return Mask(noise.argsort(dim=1, stable=True), visible)
