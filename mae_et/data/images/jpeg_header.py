"""Read a JPEG's size from its header, and tell which JPEGs a GPU can decode safely.

Decoders accept different files (CMYK, arithmetic coding, 12 bits), and interpret some differently
(colours without a JFIF marker, EXIF rotation, a truncated end). `read_header` accepts the files on
which Pillow, torchvision, TorchCodec and nvJPEG agree and which nvJPEG's hardware engine decodes as
one batch: baseline, in one scan, with common sampling. These are nearly all.

nvJPEG decodes others (mostly progressive ones) one by one, each with a host phase on the calling
thread. There are more loader processes, so they decode these. Besides, TorchCodec 0.17 starts the
host phase of one while the GPU may still read the buffers of the previous one
(`DecodeJpegCuda.cpp`), which gave wrong pixels on an H200.

Source: ITU-T T.81 (JPEG), annex B; libjpeg's `default_decompress_parms` for the colour space.
"""

from typing import NamedTuple

START = b"\xff\xd8\xff"
END = b"\xff\xd9"
BASELINE = 0xC0
OTHER_FRAMES = frozenset(range(0xC1, 0xD0)) - {0xC4}  # 0xC4: Huffman tables
APP0, APP1, APP14, SCAN = 0xE0, 0xE1, 0xEE, 0xDA
APP_UNUSED = 0xEF
WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
SAMPLING = frozenset({b"\x11", b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11"})
"""Sampling factors of each channel, 16 * horizontal + vertical: grey, 4:4:4, 4:2:2, 4:2:0."""


class JpegHeader(NamedTuple):
    """Stored size of a JPEG, before EXIF rotation."""

    height: int
    width: int
    exif: tuple[int, ...]
    """Positions of the markers of its EXIF segments, which give the rotation."""


def read_header(content: bytes) -> JpegHeader | None:
    """Return the header of a JPEG for a GPU (see above); None for any other file.

    Such files have 8 bits, one (grey) or three (YCbCr) channels, a baseline frame in one scan, and
    an end marker.
    """
    if not content.startswith(START):
        return None
    frame: bytes | None = None
    exif: list[int] = []
    jfif, adobe = False, None
    position = 2
    while position + 4 <= len(content):
        marker = content[position + 1]
        if content[position] != 0xFF or marker in WITHOUT_LENGTH or marker in OTHER_FRAMES:
            return None
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        segment = content[position + 4 : min(end, position + 32)]
        if marker == SCAN:
            # A truncated file has no end marker after its scan; Pillow reports it or copes.
            if frame is None or segment[:1] != frame[5:6] or content.rfind(END, position) < 0:
                return None
            return _usual_frame(frame, jfif, adobe, tuple(exif))
        if marker == BASELINE:
            if frame is not None:
                return None
            frame = segment
        elif marker == APP0:
            jfif |= segment.startswith(b"JFIF\0")
        elif marker == APP1 and segment.startswith(b"Exif\0"):
            exif.append(position + 1)
        elif marker == APP14 and segment.startswith(b"Adobe"):
            adobe = int.from_bytes(segment[11:12])
        position = max(end, position + 4)
    return None


def _usual_frame(
    frame: bytes, jfif: bool, adobe: int | None, exif: tuple[int, ...]
) -> JpegHeader | None:
    """Parse a frame: bits, height, width, then name and sampling of each channel."""
    if len(frame) < 6 or len(frame) < 6 + 3 * frame[5] or frame[0] != 8:
        return None
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    names, sampling = frame[6 : 6 + 3 * frame[5] : 3], frame[7 : 6 + 3 * frame[5] : 3]
    if not height or not width or sampling not in SAMPLING:
        return None
    ycbcr = (jfif or adobe == 1 or names == b"\1\2\3") and adobe in {None, 1} and names != b"RGB"
    return JpegHeader(height, width, exif) if len(names) == 1 or ycbcr else None
