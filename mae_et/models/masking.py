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


def masks(
    batch: int,
    patches: int,
    mask_ratio: float = 0.75,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Draw a random mask for each image.

    Args:
        batch: B.
        patches: N.
        mask_ratio: fraction of patches to mask, in (0, 1).
        generator: source of the noise, on `device`; torch's global one by default.
        device: device of the mask.

    Raises:
        ValueError: all patches or none would be masked.

    Source: MAE (He et al., CVPR 2022, arXiv 2111.06377).
    """
    noise = torch.rand(batch, patches, generator=generator, device=device)
    return mask_from_noise(noise, mask_ratio)


def mask_from_noise(noise: Tensor, mask_ratio: float) -> Mask:
    """Return the mask that keeps the V smallest entries of each row of noise [B N] visible.

    Raises:
        ValueError: no patch or every patch would stay visible.
    """
    visible = visible_patches(noise.shape[1], mask_ratio)
    return Mask(noise.argsort(dim=1, stable=True), visible)
