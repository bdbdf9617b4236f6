"""Read a JPEG's size from its header, and tell which JPEGs every decoder reads alike.

Decoders differ in what they accept (CMYK, arithmetic coding, 12 bits) and in what they make of a
file (colours without JFIF marker, EXIF rotation, a cut end). `read_header` accepts the files on
which Pillow, torchvision, TorchCodec and nvJPEG agree, which are nearly all; others are left to
Pillow.

Source: ITU-T T.81 (JPEG), annex B; libjpeg's `default_decompress_parms` for the colour space.
"""

from typing import NamedTuple

START = b"\xff\xd8\xff"
END = b"\xff\xd9"
BASELINE, PROGRESSIVE = 0xC0, 0xC2
OTHER_FRAMES = frozenset(range(0xC0, 0xD0)) - {BASELINE, PROGRESSIVE, 0xC4}  # 0xC4: Huffman tables
APP0, APP1, APP14, SCAN = 0xE0, 0xE1, 0xEE, 0xDA
APP_UNUSED = 0xEF
WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
COLOUR_SAMPLING = frozenset({0x11, 0x12, 0x21, 0x22, 0x41})
"""Factors of the luma channel, 16 * horizontal + vertical, over chroma channels of 0x11."""


class JpegHeader(NamedTuple):
    """Stored size of a JPEG, before EXIF rotation."""

    height: int
    width: int
    exif: tuple[int, ...]
    """Positions of the markers of its EXIF segments, which hold the rotation."""


def read_header(content: bytes) -> JpegHeader | None:
    """Return the header of a JPEG that every decoder reads alike; None for any other file.

    These have 8 bits, one (grey) or three (YCbCr) channels, a baseline or progressive frame and an
    end marker.
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
            # A cut file has no end after its scan; Pillow reports it or copes.
            if frame is None or content.rfind(END, position) < 0:
                return None
            return _usual_frame(frame, jfif, adobe, tuple(exif))
        if marker in {BASELINE, PROGRESSIVE}:
            if frame is not None:
                return None
            frame = segment
        elif marker == APP0:
            jfif |= segment.startswith(b"JFIF\0")
        elif marker == APP1 and segment.startswith(b"Exif\0"):
            exif.append(position + 1)
        elif marker == APP14 and segment.startswith(b"Adobe"):
            adobe = segment[11] if len(segment) > 11 else 0
        position = max(end, position + 4)
    return None


def _usual_frame(
    frame: bytes, jfif: bool, adobe: int | None, exif: tuple[int, ...]
) -> JpegHeader | None:
    """Return the header of a frame: bits, height, width, then name and sampling of channels."""
    if len(frame) < 6 or len(frame) < 6 + 3 * frame[5] or frame[0] != 8:
        return None
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    names, sampling = frame[6 : 6 + 3 * frame[5] : 3], frame[7 : 6 + 3 * frame[5] : 3]
    if not height or not width:
        return None
    if len(names) == 1:
        return JpegHeader(height, width, exif)
    ycbcr = (jfif or adobe == 1 or names == b"\1\2\3") and adobe in {None, 1} and names != b"RGB"
    usual = len(names) == 3 and sampling[0] in COLOUR_SAMPLING and sampling[1:] == b"\x11\x11"
    return JpegHeader(height, width, exif) if ycbcr and usual else None
