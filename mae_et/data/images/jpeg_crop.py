"""Decode a file directly to a small random crop, without an image of the base size in between.

The box of a random-resized crop is drawn from the size in the file's header. A JPEG is then decoded
at the coarsest DCT scale (1/2, 1/4, 1/8) at which the box keeps `DETAIL` times the crop's side, and
the box is resized once. Rounding the box to pixels of the decoded image moves it by at most half
such a pixel.

simplejpeg decodes if installed (the extra `fast`), otherwise Pillow; both use libjpeg-turbo and
differ by a few of 255 levels at most. torch's antialiased bicubic filter on uint8, which equals
Pillow's, resizes.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from mae_et.config.data import DataConfig
from mae_et.data.images.boxes import Box, BoxSampler, PixelBox
from mae_et.data.images.channels import to_channels
from mae_et.data.images.decoding import MAX_PIXELS, decode, open_image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

DETAIL = 1.5
BOX_ATTEMPTS = 10
JPEG = b"\xff\xd8\xff"
SCALES = (8, 4, 2)


def draw_crop(config: DataConfig, generator: Generator) -> tuple[BoxSampler, bool]:
    """Draw a random-resized crop: the box, as a function of the image's size, and the flip."""
    numbers = torch.rand(4 * BOX_ATTEMPTS + 1, generator=generator, dtype=torch.float64).tolist()
    sample_box = partial(random_box, scale=config.scale, ratio=config.ratio, numbers=numbers)
    return sample_box, numbers[-1] < config.flip


def random_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    numbers: Sequence[float],
) -> Box:
    """Return a random box with the distribution of torchvision's RandomResizedCrop.

    It is determined by 4 * BOX_ATTEMPTS uniform numbers in [0, 1).
    """
    for first in range(0, 4 * BOX_ATTEMPTS, 4):
        area, shape, down, right = numbers[first : first + 4]
        pixels = height * width * (scale[0] + area * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + shape * (high - low))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w)
    # No attempt fits: take the largest centred box with an allowed ratio.
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop_and_resize(
    content: Any,
    channels: int,
    sample_box: BoxSampler,
    size: int,
    max_value: float | None = None,
) -> Tensor:
    """Crop a box of an image (encoded, .npy or PIL) and resize it to a square.

    Returns:
        [C size size], uint8 (float32 for arrays that are not uint8).
    """
    if isinstance(content, bytes) and content.startswith(JPEG):
        return _crop_jpeg(content, channels, sample_box, size)
    image = decode(content, channels, max_value)
    if isinstance(image, Image.Image):
        image = _tensor(np.array(image))
    return _crop_tensor(image, sample_box(*image.shape[-2:]), size)


def _crop_jpeg(content: bytes, channels: int, sample_box: BoxSampler, size: int) -> Tensor:
    if simplejpeg is not None and channels == 3:
        crop = _crop_with_simplejpeg(content, sample_box, size)
        if crop is not None:
            return crop
    with open_image(content) as image:
        width, height = image.size
        box = sample_box(height, width)
        scale = coarsest_scale(box, size)
        if scale > 1:
            image.draft(None, (width // scale, height // scale))
        pixels = _tensor(np.array(to_channels(image, channels)))
    if pixels.shape[-1] == width:  # the file has no coarser scale
        scale = 1
    return _crop_tensor(pixels, box.scaled(1 / scale, 1 / scale), size)


def _crop_with_simplejpeg(content: bytes, sample_box: BoxSampler, size: int) -> Tensor | None:
    """Crop an ordinary JPEG; return None for one that Pillow should read."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in {"YCbCr", "Gray", "RGB"} or height * width > MAX_PIXELS:
            return None
        box = sample_box(height, width)
        scale = coarsest_scale(box, size)
        pixels = simplejpeg.decode_jpeg(
            content, "RGB", min_height=-(-height // scale), min_width=-(-width // scale)
        )
    except ValueError:  # damaged or unusual; Pillow reads it or explains the error
        return None
    return _crop_tensor(_tensor(pixels), box.scaled(1 / scale, 1 / scale), size)


def coarsest_scale(box: Box, size: int) -> int:
    """Return the largest DCT divisor at which both sides of a box keep `DETAIL * size` pixels."""
    side = min(box.height, box.width)
    return next((scale for scale in SCALES if side >= scale * DETAIL * size), 1)


def _tensor(pixels: np.ndarray) -> Tensor:
    """[H W] or [H W C] -> [C H W], without a copy."""
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def round_box(box: Box, height: int, width: int) -> PixelBox:
    """Round a box to whole pixels, with at least one inside the image."""
    top, left = min(round(box.top), height - 1), min(round(box.left), width - 1)
    bottom = max(top + 1, min(height, round(box.top + box.height)))
    right = max(left + 1, min(width, round(box.left + box.width)))
    return top, left, bottom - top, right - left


def _crop_tensor(image: Tensor, box: Box, size: int) -> Tensor:
    """Resize a box of an image [C H W], rounded to whole pixels, to [C size size]."""
    top, left, height, width = round_box(box, *image.shape[-2:])
    region = image[None, :, top : top + height, left : left + width]
    return F.interpolate(region, (size, size), mode="bicubic", antialias=True)[0].contiguous()
