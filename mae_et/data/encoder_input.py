"""Crop, normalise and mask images for the encoder.

Shapes: B images, C channels, H size, S bandwidth, N = (S / patch)^2 patches.
"""

from torch import Tensor

from mae_et.config.data import DataConfig
from mae_et.config.schema import Method
from mae_et.curriculum.frequency import low_frequency_crop
from mae_et.data.transforms import normalise
from mae_et.models.masking import Mask, mask_from_noise


def encoder_input(
    images: Tensor,
    noise: Tensor,
    bandwidth: int,
    method: Method,
    mask_ratio: float,
    data: DataConfig,
) -> tuple[Tensor, Mask]:
    """Return the normalised low-frequency crop of images, float32 [B C S S], and its mask.

    Images are uint8 or in [0, 1], [B C H W] with H at least the bandwidth S; noise is float32
    [B N]. `data` has their statistics.

    Raises:
        ValueError: no patch or every patch would stay visible.
    """
    mask = mask_from_noise(noise, mask_ratio)
    images = low_frequency_crop(images, bandwidth, method)
    return normalise(images, data.mean, data.std), mask
