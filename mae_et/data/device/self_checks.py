"""Check a device's results before a run relies on them, and avoid what it gets wrong."""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_et.data.device.box_resize import Resize, resize_boxes
from mae_et.errors import one_line

IMAGES, HEIGHT, WIDTH = 16, 375, 500
ROUNDS = 3

Decode = Callable[[list[Tensor], torch.device], list[Tensor]]
"""Decodes files, uint8 [bytes] each, to RGB images, uint8 [3 H W] each, on a device."""


def checked_decode(decode: Decode, device: torch.device) -> tuple[Decode, str]:
    """Return a decoder whose batches are right, and how it differs from the given one.

    Without a JPEG engine on the GPU, nvJPEG decodes one image after another. TorchCodec 0.17 does
    not wait in between, so an image can overwrite buffers from which the GPU still reads the
    previous one. It does wait at the end of each call: images decoded one per call are right.
    """
    noise = np.random.default_rng(0)
    contents = [
        encode_jpeg(noise.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)) for _ in range(IMAGES)
    ]

    def one_by_one(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        return [image for content in contents for image in decode([content], device)]

    try:
        alone = one_by_one(contents, device)
        for _ in range(ROUNDS):
            together = decode(contents, device)
            if not all(torch.equal(*pair) for pair in zip(alone, together, strict=True)):
                return one_by_one, "one image at a time, as its batches have wrong pixels"
    except Exception as error:  # decoders raise many types
        return one_by_one, f"one image at a time, as a batch failed: {one_line(error)[:200]}"
    return decode, ""


def encode_jpeg(pixels: np.ndarray) -> Tensor:
    """Encode an image, uint8 [H W 3], as a JPEG, uint8 [bytes]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def fastest_resize(device: torch.device) -> tuple[Resize, str]:
    """Return the Triton kernels if they compile and are right, else the products and the reason.

    This call compiles the kernels, before threads use them.
    """
    pixels = (torch.arange(3 * 60 * 90) ** 2 % 251).byte().reshape(3, 60, 90).to(device)
    views = [pixels, pixels[:1].expand(3, -1, -1)], [(3, 5, 50, 80), (20, 30, 7, 5)], [False, True]
    try:
        from mae_et.data.device.box_resize_triton import resize_boxes as with_kernels

        right = torch.equal(with_kernels(*views, 24), resize_boxes(*views, 24))
        reason = "its pixels are wrong"
    except Exception as error:  # not installed, without a compiler, or an old GPU
        right, reason = False, one_line(error)[:200]
    if right:
        return with_kernels, ""
    return resize_boxes, f"resized without Triton, which is slower: {reason}"
