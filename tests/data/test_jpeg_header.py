"""JPEGs that every decoder reads alike are recognised from their headers; others are not."""

import io

import numpy as np
import pytest
import torch
from hostile import broken, encoded, noise, unusual
from PIL import Image

from mae_et.data.device.choose_decoder import decode_torchvision
from mae_et.data.device.encoded import EncodedView, _joined
from mae_et.data.images.jpeg_header import JpegHeader, read_header
from mae_et.data.sampler import SampleIndex


def rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    return encoded(image, "JPEG", exif=exif)


@pytest.mark.parametrize("size", [(1, 1), (40, 48), (480, 7), (3, 500)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"subsampling": 0}])
def test_a_usual_jpeg_has_the_size_that_pillow_reads(size, mode, options) -> None:
    content = encoded(noise(*size).convert(mode), "JPEG", **options)
    assert read_header(content) == JpegHeader(*size, ())
    assert read_header(content + b"trailing bytes") == JpegHeader(*size, ())


@pytest.mark.parametrize("name", sorted(unusual().keys() | broken().keys()))
def test_what_decoders_read_differently_or_image_after_image_has_no_header(name: str) -> None:
    content = (unusual() | broken())[name]
    usual = {"grey.jpg", "one_pixel.jpg", "tall.jpg"}
    assert (read_header(content) is not None) == (name in usual)


@pytest.mark.parametrize(
    ("mode", "luma", "usual"),
    [
        ("RGB", 0x11, True), ("RGB", 0x21, True), ("RGB", 0x22, True), ("L", 0x11, True),
        ("RGB", 0x12, False), ("RGB", 0x41, False), ("L", 0x22, False),
    ],
)  # fmt: skip
def test_only_sampling_that_the_hardware_decodes_has_a_header(mode, luma: int, usual: bool) -> None:
    content = bytearray(encoded(noise().convert(mode), "JPEG"))
    content[content.index(b"\xff\xc0") + 11] = luma
    assert (read_header(bytes(content)) is not None) is usual


def test_a_jpeg_of_several_scans_has_no_header() -> None:
    content = bytearray(encoded(noise(), "JPEG"))
    content[content.index(b"\xff\xda") + 4] = 1  # channel in the first scan
    assert read_header(bytes(content)) is None


def test_a_jpeg_cut_anywhere_has_no_header() -> None:
    content = encoded(noise(), "JPEG")
    assert all(read_header(content[:end]) is None for end in range(len(content) - 1))


def test_colours_without_a_sign_of_their_space_have_no_header() -> None:
    content = encoded(noise(), "JPEG")
    frame = content.index(b"\xff\xc0")
    names = bytearray(content)
    names[frame + 10 : frame + 19 : 3] = b"RGB"
    assert read_header(bytes(names)) is None
    twelve_bits = bytearray(content)
    twelve_bits[frame + 4] = 12
    assert read_header(bytes(twelve_bits)) is None
    assert read_header(content.replace(b"JFIF\0", b"JFXX\0")) is not None  # channels 1, 2, 3
    names = bytearray(content.replace(b"JFIF\0", b"JFXX\0"))
    names[frame + 10 : frame + 19 : 3] = b"\0\1\2"
    assert read_header(bytes(names)) is None


@pytest.mark.parametrize(
    ("transform", "usual"), [(b"\1", True), (b"\0", False), (b"\2", False), (b"", False)]
)
def test_only_ycbcr_of_adobe_has_a_header(transform: bytes, usual: bool) -> None:
    segment = b"Adobe\0\x64\0\0\0\0" + transform
    marker = b"\xff\xee" + (2 + len(segment)).to_bytes(2, "big") + segment
    content = encoded(noise(), "JPEG")
    assert (read_header(content[:2] + marker + content[2:]) is not None) is usual


def test_exif_rotation_is_hidden_from_the_decoder() -> None:
    content = rotated(noise(40, 48))
    header = read_header(content)
    assert header is not None
    assert header[:2] == (40, 48)
    assert len(header.exif) == 1
    file = np.frombuffer(content, np.uint8)
    view = EncodedView(file, header, (0, 0, 40, 48), False, torch.empty(0), SampleIndex(0, 0, 0))
    hidden = _joined([view])
    assert Image.open(io.BytesIO(hidden.numpy().tobytes())).getexif() == {}
    (image,) = decode_torchvision([hidden], torch.device("cpu"))
    assert image.shape == (3, 40, 48)
