"""From a file's bytes straight to a small random crop: no picture of the base size in between.

The box of a random-resized crop is drawn from the size in the file's header. A JPEG is then decoded
at the coarsest scale of its cosine transform (1/2, 1/4, 1/8) that leaves `DETAIL` times the wanted
side, and the box is resized once. The box that is read is the drawn one, rounded to pixels of the
decoded picture: half a pixel of it at most.

Decoding is simplejpeg's where it is installed (the extra `fast`), else Pillow's; both are
libjpeg-turbo, and differ by a few of 255 levels at most. Resizing is torch's antialiased bicubic
one on uint8, which is Pillow's filter.
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

from mae_et.config.schema import DataConfig
from mae_et.data.decoding import (
    MAX_PIXELS,
    Box,
    BoxSampler,
    DecodedDataset,
    decode,
    open_image,
    to_channels,
)

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

DETAIL = 1.5
TRIES = 10
JPEG = b"\xff\xd8\xff"
SCALES = (8, 4, 2)


def random_crop(
    source: DecodedDataset, index: int, config: DataConfig, size: int, generator: Generator
) -> tuple[Tensor, int]:
    """Return a random-resized crop of an image, flipped or not, and its label.

    Args:
        source: of images.
        index: which one.
        config: scale and ratio of the box, and the chance of a flip.
        size: side of the crop in pixels; the box does not depend on it.
        generator: decides on the box and the flip.

    Returns:
        [C size size], uint8 (float32 where the file is), and the label.

    Raises:
        Unreadable: the image cannot be read.
    """
    numbers = torch.rand(4 * TRIES + 1, generator=generator, dtype=torch.float64).tolist()
    drawn = partial(random_box, scale=config.scale, ratio=config.ratio, numbers=numbers)
    with source.naming_errors(index):
        content, label, draw = source.read_for_crop(index, drawn, size)
        crop = crop_and_resize(content, source.channels, draw, size)
    return (crop.flip(-1) if numbers[-1] < config.flip else crop), label


def random_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    numbers: Sequence[float],
) -> Box:
    """Return a random box, distributed as that of torchvision's RandomResizedCrop.

    Args:
        height: of the picture, in pixels.
        width: of the picture.
        scale: smallest and largest area, as shares of the picture.
        ratio: smallest and largest width / height.
        numbers: 4 * TRIES uniform ones in [0, 1); the box is a function of them.
    """
    for first in range(0, 4 * TRIES, 4):
        area, shape, down, right = numbers[first : first + 4]
        pixels = height * width * (scale[0] + area * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + shape * (high - low))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w)
    # What fits best, in the middle.
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop_and_resize(content: Any, channels: int, draw: BoxSampler, size: int) -> Tensor:
    """Return a box of a picture at a size.

    Args:
        content: an encoded picture, a .npy file, or a PIL image.
        channels: of the result.
        draw: the box, given height and width.
        size: side of the result in pixels.

    Returns:
        [C size size], uint8 (float32 where the file is).
    """
    if isinstance(content, bytes) and content.startswith(JPEG):
        return _crop_jpeg(content, channels, draw, size)
    read = decode if isinstance(content, bytes) else to_channels
    image = read(content, channels)
    if isinstance(image, Image.Image):
        image = _tensor(np.array(image))
    return _resized(image, draw(*image.shape[-2:]), size)


def _crop_jpeg(content: bytes, channels: int, draw: BoxSampler, size: int) -> Tensor:
    fast = _fast_crop(content, draw, size) if simplejpeg is not None and channels == 3 else None
    if fast is not None:
        return fast
    with open_image(content) as image:
        width, height = image.size
        box = draw(height, width)
        scale = coarsest_scale(box, size)
        if scale > 1:
            image.draft(None, (width // scale, height // scale))
        pixels = _tensor(np.array(to_channels(image, channels)))
    if pixels.shape[-1] == width:  # a file that has no coarser scale
        scale = 1
    return _resized(pixels, box.scaled(1 / scale, 1 / scale), size)


def _fast_crop(content: bytes, draw: BoxSampler, size: int) -> Tensor | None:
    """Do as `_crop_jpeg` for the usual files; None for those that are left to Pillow."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in {"YCbCr", "Gray", "RGB"} or height * width > MAX_PIXELS:
            return None
        box = draw(height, width)
        scale = coarsest_scale(box, size)
        pixels = simplejpeg.decode_jpeg(
            content, "RGB", min_height=-(-height // scale), min_width=-(-width // scale)
        )
    except ValueError:  # damaged, or merely odd: Pillow reads it, or says what is wrong
        return None
    return _resized(_tensor(pixels), box.scaled(1 / scale, 1 / scale), size)


def coarsest_scale(box: Box, size: int, detail: float = DETAIL) -> int:
    """Return the largest divisor by which a box still has `detail * size` pixels a side."""
    side = min(box.height, box.width)
    return next((scale for scale in SCALES if side >= scale * detail * size), 1)


def _tensor(pixels: np.ndarray) -> Tensor:
    """[H W] or [H W C] -> [C H W], without a copy."""
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def round_box(box: Box, height: int, width: int) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of a box, rounded, in a picture of this size."""
    top, left = min(round(box.top), height - 1), min(round(box.left), width - 1)
    bottom = max(top + 1, min(height, round(box.top + box.height)))
    right = max(left + 1, min(width, round(box.left + box.width)))
    return top, left, bottom, right


def _resized(image: Tensor, box: Box, size: int) -> Tensor:
    """Resize a box of an image [C H W], rounded to whole pixels, to [C size size]."""
    top, left, bottom, right = round_box(box, *image.shape[-2:])
    part = image[None, :, top:bottom, left:right]
    return F.interpolate(part, (size, size), mode="bicubic", antialias=True)[0].contiguous()
