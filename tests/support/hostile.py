"""Image files that are unusual but valid, and files that cannot be read."""

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from image_files import npy
from PIL import Image


def noise(height: int = 40, width: int = 48, seed: int = 0) -> Image.Image:
    """Return an image of noise under a ramp, which no format stores in a few bytes."""
    grey = np.random.default_rng(seed).integers(0, 96, (height, width, 3))
    return Image.fromarray((grey + np.linspace(0, 150, width)[:, None].astype(int)).astype("uint8"))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """Return a PNG of any header, over any rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def frames(kind: str) -> bytes:
    return encoded(
        noise(), kind, save_all=True, append_images=[noise(seed=n) for n in (1, 2)], duration=40
    )


def unusual() -> dict[str, bytes]:
    """Return files that are images all the same."""
    grey = np.arange(40 * 48, dtype=np.uint16).reshape(40, 48) * 30
    deep = b"".join(b"\0" + grey[row].repeat(3).astype(">u2").tobytes() for row in range(40))
    clear = noise().quantize(16)
    clear.info["transparency"] = 3
    return {
        "cmyk.jpg": encoded(noise().convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(noise(), "JPEG", progressive=True),
        "grey.jpg": encoded(noise().convert("L"), "JPEG"),
        "sixteen_bit_grey.png": encoded(Image.fromarray(grey), "PNG"),
        "sixteen_bit_colours.png": png(48, 40, 16, 2, deep),
        "sixteen_bit.tif": encoded(Image.fromarray(grey), "TIFF"),
        "one_bit.png": encoded(noise().convert("1"), "PNG"),
        "palette.png": encoded(clear, "PNG", transparency=3),
        "grey_alpha.png": encoded(noise().convert("LA"), "PNG"),
        "animated.gif": frames("GIF"),
        "animated.png": frames("PNG"),
        "animated.webp": frames("WEBP"),
        "pages.tif": frames("TIFF"),
        "png_called.jpg": encoded(noise(), "PNG"),
        "one_pixel.png": encoded(noise(1, 1), "PNG"),
        "one_pixel.jpg": encoded(noise(1, 1), "JPEG"),
        "long.png": encoded(noise(1, 20_000), "PNG"),
        "tall.jpg": encoded(noise(20_000, 1), "JPEG"),
        "long.npy": npy(np.zeros((20_000, 2, 3), np.uint8)),
    }


def broken() -> dict[str, bytes]:
    """Return files that are no images."""
    whole = {kind: encoded(noise(), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")}
    cut = {f"half.{kind.lower()}": content[: len(content) // 2] for kind, content in whole.items()}
    header = npy(np.zeros((1, 1, 3), np.uint8))
    return cut | {
        "empty.jpg": b"",
        "text.png": b"no image at all",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "head.jpg": whole["JPEG"][:3],
        "zeros.jpg": b"\xff\xd8\xff" + bytes(5000),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "bomb.png": png(60_000, 60_000, 8, 2, bytes(10_000)),
        "bomb_of_one_bit.png": png(2**31 - 1, 1, 1, 0, bytes(10_000)),
        "float.tif": encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
        "garbage.npy": b"\x93NUMPY\x01\x00garbage",
        "objects.npy": npy(np.array([[None]])),
        "vector.npy": npy(np.zeros(9)),
        "no_rows.npy": npy(np.zeros((0, 9, 3), np.uint8)),
        "nan.npy": npy(np.full((9, 9, 3), np.nan)),
        "overflow.npy": npy(np.full((9, 9, 3), 1e300)),
        "claims_30_gb.npy": header.replace(b"(1, 1, 3), }" + b" " * 8, b"(99999, 99999, 3), }"),
    }


def unreadable() -> dict[str, Callable[[Path], object]]:
    """Return what makes entries of a folder that are called images and cannot be read."""

    def loop(path: Path) -> None:
        path.symlink_to(path.name)

    return {
        "no_such.png": lambda path: path.symlink_to("nowhere"),
        "loop.png": loop,
        "pipe.png": lambda path: os.mkfifo(path),
        "endless.png": lambda path: path.symlink_to("/dev/zero"),
    }


def changed(content: bytes, chance: random.Random, first: int = 0) -> bytes:
    """Return a copy with bits flipped, bytes removed, doubled or inserted, or its end truncated.

    The bytes before `first` stay.
    """
    data = bytearray(content)
    first = min(first, len(data))
    for _ in range(chance.choice((1, 1, 3, 12))):
        at = chance.randrange(first, len(data) + 1)
        size = chance.choice((1, 1, 4, 40))
        kind = chance.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at : at + size]
        elif kind == 2:
            data[at:at] = data[at : at + size]
        elif kind == 3:
            data[at : at + size] = chance.randbytes(size)
        elif chance.random() < 0.5:
            del data[at:]
    return bytes(data)
