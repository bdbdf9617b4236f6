"""Images of 10 to 14 bits and arrays of any scale are scaled as configured, or warned of."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hostile import png
from image_files import encoded, npy
from PIL import Image

from mae_et.config.data import DataConfig
from mae_et.data.batch import Batch, collate
from mae_et.data.datasets import open_dataset
from mae_et.data.images.boxes import Box
from mae_et.data.images.decoding import decode
from mae_et.data.images.jpeg_crop import crop_and_resize
from mae_et.data.transforms import EvalDataset, normalise
from mae_et.errors import Unreadable, UserError
from mae_et.runtime.console import notify


def grey(bits: int, kind: str = "PNG") -> bytes:
    """Encode a ramp over the whole range of some bits in a 16-bit file."""
    ramp = np.linspace(0, 2**bits - 1, 256).round().astype(np.uint16).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, kind)
    return file.getvalue()


def colours(bits: int) -> bytes:
    """Encode a 16-bit RGB PNG, which Pillow reads but does not write."""
    rows = np.full((4, 12), 2**bits - 1, ">u2")
    return png(4, 4, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows))


def tiff(pixels: np.ndarray, photometric: int = 1, signed: bool = False) -> bytes:
    """Encode a grey TIFF of one strip, of kinds that Pillow reads but does not write."""
    (height, width), content = pixels.shape, pixels.tobytes()
    tags = {
        256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: photometric, 273: 8,
        277: 1, 278: height, 279: len(content), 339: 1 + signed,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(content)) + content
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


def write(root: Path, name: str, content: bytes) -> Path:
    (root / "train").mkdir(exist_ok=True)
    (root / "train" / name).write_bytes(content)
    return root


def warned(config: DataConfig, channels: int = 3) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_dataset(config, "train", channels)
    return " ".join(str(each.message) for each in caught)


@pytest.mark.parametrize(("white", "low"), [(30000, True), (32767, True), (32768, False)])
def test_values_below_half_of_the_range_are_warned_of(
    tmp_path: Path, white: int, low: bool
) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), white, np.uint16)).save(file, "PNG")
    root = write(tmp_path, "0.png", file.getvalue())
    assert (f"reach {white} of 65535" in warned(DataConfig(root=root))) is low


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_fewer_bits_in_16_bit_files_are_warned_of_and_scaled(
    tmp_path: Path, bits: int, kind: str
) -> None:
    root = write(tmp_path, f"0.{kind.lower()}", grey(bits, kind))
    white = 2**bits - 1
    assert f"reach {white} of 65535: if they have fewer bits, give data.max_value {white}" in (
        warned(DataConfig(root=root))
    )
    config = DataConfig(root=root, max_value=white)
    assert warned(config) == ""
    image, _ = open_dataset(config, "train", 1)[0]
    assert np.asarray(image).ravel().tolist() == list(range(256))


def test_missing_pixels_at_the_top_of_the_range_do_not_hide_fewer_bits(tmp_path: Path) -> None:
    pixels = np.full((4, 4), 65535, np.uint16)
    pixels[0] = 4095
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    config = DataConfig(root=write(tmp_path, "0.png", file.getvalue()))
    assert "reach 4095 of 65535, apart from 65535: if" in warned(config)


def test_values_above_the_given_white_are_warned_of(tmp_path: Path) -> None:
    config = DataConfig(root=write(tmp_path, "0.png", grey(12)), max_value=1023)
    assert "reach 4095, above data.max_value 1023" in warned(config)
    image, _ = open_dataset(config, "train", 1)[0]
    assert np.asarray(image).max() == 255


@pytest.mark.parametrize("bits", [8, 16])
def test_black_is_black_in_tiff_files_whose_zero_is_white(tmp_path: Path, bits: int) -> None:
    """PIL inverts those of 8 bits, and left those of 16 as they are."""
    ramp = np.arange(256, dtype=f"<u{bits // 8}").reshape(16, 16) * (257 if bits == 16 else 1)
    image, _ = open_dataset(DataConfig(root=write(tmp_path, "0.tif", tiff(ramp, 0))), "train", 1)[0]
    assert np.asarray(image).ravel().tolist() == list(range(255, -1, -1))


def test_signed_8_bit_numbers_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path, "0.tif", tiff(np.full((4, 4), -1, "i1"), signed=True))
    with pytest.raises(Unreadable, match=r"8-bit numbers are signed; save it as \.npy"):
        open_dataset(DataConfig(root=root), "train", 1)[0]


@pytest.mark.parametrize("bands", [3, 4])
def test_16_bit_colours_in_planes_are_read_or_refused(tmp_path: Path, bands: int) -> None:
    """Pillow decodes uncompressed planes as if they had 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 2**16, (bands, 4, 6), np.uint16)
    for compression, readable in ((None, False), ("deflate", True)):
        file = io.BytesIO()
        settings = {"planarconfig": "separate", "extrasamples": [2] * (bands - 3)}
        tifffile.imwrite(file, pixels, photometric="rgb", compression=compression, **settings)
        source = open_dataset(DataConfig(root=write(tmp_path, "0.tif", file.getvalue())), "train")
        if readable:
            assert np.array_equal(np.asarray(source[0][0]), pixels[:3].transpose(1, 2, 0) >> 8)
        else:
            with pytest.raises(Unreadable, match=r"16-bit TIFF in planes; save it as \.npy"):
                source[0]


def test_jpeg_2000_in_colours_of_over_8_bits_is_refused(tmp_path: Path) -> None:
    """Pillow reads their white as black; it does not write them, so the header is changed here."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4)).save(file, "JPEG2000")
    content = bytearray(file.getvalue())
    first = content.index(b"\xff\x4f\xff\x51") + 42
    source = open_dataset(DataConfig(root=write(tmp_path, "0.jp2", bytes(content))), "train")
    assert source[0][0].size == (6, 4)
    content[first : first + 9 : 3] = [15] * 3
    write(tmp_path, "0.jp2", bytes(content))
    with pytest.raises(Unreadable, match=r"JPEG 2000 in colours of over 8 bits; save it as \.npy"):
        source[0]


def test_further_bands_of_tiff_files_are_reported_and_never_taken_for_transparency(
    tmp_path: Path, capsys
) -> None:
    notify.cache_clear()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4), np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", extrasamples=[0])  # red to near infrared
    config = DataConfig(root=write(tmp_path, "0.tif", file.getvalue()))
    image, _ = open_dataset(config, "train")[0]
    assert np.array_equal(np.asarray(image), pixels[..., :3])
    assert "hold 1 more bands than colours, not read" in capsys.readouterr().err
    with pytest.raises(Unreadable, match=r"fourth band is not marked as transparency; .*\.npy"):
        open_dataset(config, "train", 4)[0]


@pytest.mark.parametrize("numbers", [(-1000, 998), (0, 70_000)])
def test_grey_outside_of_16_bits_is_refused_without_advice_on_a_range(
    tmp_path: Path, numbers: tuple[int, int]
) -> None:
    """As the Hounsfield units of computed tomography."""
    pixels = np.array([numbers], "i4")
    root = write(tmp_path, "0.tif", tiff(pixels, signed=True))
    assert warned(DataConfig(root=root)) == ""
    sentence = rf"numbers {numbers[0]} to {numbers[1]} exceed 0 to 65535; save it as \.npy"
    with pytest.raises(Unreadable, match=sentence):
        open_dataset(DataConfig(root=root), "train", 1)[0]


def test_files_of_several_images_are_reported(tmp_path: Path, capsys) -> None:
    notify.cache_clear()
    pages = [Image.fromarray(np.full((4, 4), 65535, np.uint16))] * 3
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    open_dataset(DataConfig(root=write(tmp_path, "0.tif", file.getvalue())), "train", 1)
    assert "hold up to 3 images: the first image of each is read" in capsys.readouterr().err


def test_16_bit_colours_are_warned_of_and_refused_with_a_range(tmp_path: Path) -> None:
    root = write(tmp_path, "0.png", colours(12))
    assert "16-bit colours reach 15 of 255" in warned(DataConfig(root=root))
    with pytest.raises(Unreadable, match=r"16-bit colours decode to their high byte.*\.npy"):
        open_dataset(DataConfig(root=root, max_value=4095), "train")[0]
    assert "reach 127 of 255" in warned(DataConfig(root=write(tmp_path, "0.png", colours(15))))
    assert warned(DataConfig(root=write(tmp_path, "0.png", colours(16)))) == ""


def test_pgm_files_state_their_own_range(tmp_path: Path) -> None:
    pgm = b"P5\n4 4\n4095\n" + np.full((4, 4), 4095, ">u2").tobytes()
    config = DataConfig(root=write(tmp_path, "0.pgm", pgm), max_value=4095)
    image, _ = open_dataset(config, "train", 1)[0]
    assert np.asarray(image).min() == 255


def test_decoded_crops_use_the_same_range() -> None:
    content = grey(12)
    whole = crop_and_resize(content, 1, lambda h, w: Box(0, 0, h, w), 16, 4095)
    assert torch.equal(whole[0], torch.from_numpy(np.array(decode(content, 1, 4095))))


@pytest.mark.parametrize(
    ("dtype", "top"), [("uint16", 4095), ("float32", 255), ("float64", 10_000), ("int32", 1023)]
)
def test_arrays_of_another_scale_are_warned_of_and_scaled(
    tmp_path: Path, dtype: str, top: int, capsys
) -> None:
    array = (np.random.default_rng(0).random((20, 20, 5)) * top).astype(dtype)
    array[0, 0] = top
    root = write(tmp_path, "0.npy", npy(array))
    config = DataConfig(root=root, mean=(0.5,), std=(0.25,))
    assert "standard deviations: give data.max_value" in warned(config, 5)
    scaled = DataConfig(root=root, mean=(0.5,), std=(0.25,), max_value=top)
    assert warned(scaled, 5) == ""
    line = f"{dtype} arrays [H W C] with values from"
    assert line in capsys.readouterr().err
    image, _ = open_dataset(scaled, "train", 5)[0]
    assert isinstance(image, torch.Tensor)
    torch.testing.assert_close(
        image, torch.from_numpy(array.astype(np.float32) / top).permute(2, 0, 1)
    )
    view = EvalDataset(open_dataset(scaled, "train", 5), scaled, 16)[0][0]
    assert normalise(view[None], scaled.mean, scaled.std).abs().max() < 4


def test_arrays_scaled_twice_are_warned_of(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((20, 20, 3)).astype(np.float32) / 255
    assert "give data.max_value" in warned(DataConfig(root=write(tmp_path, "0.npy", npy(array))))


def test_statistics_in_units_of_the_arrays_need_no_range(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal([3000, 0.1], [900, 0.02], (20, 20, 2))
    config = DataConfig(
        root=write(tmp_path, "0.npy", npy(array)), mean=(3000, 0.1), std=(900, 0.02)
    )
    assert warned(config, 2) == ""


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_arrays_with_channels_first_are_refused_with_the_reason(
    tmp_path: Path, dtype: str, capsys
) -> None:
    root = write(tmp_path, "0.npy", npy(np.zeros((3, 20, 20), dtype)))
    with pytest.raises(Unreadable, match=r"seems to be \[C H W\], save it as \[H W C\]"):
        open_dataset(DataConfig(root=root), "train")[0]
    assert "are divided by" not in capsys.readouterr().err


def test_complex_numbers_are_refused(tmp_path: Path, capsys) -> None:
    content = npy(np.ones((4, 4, 3), np.complex64))
    with pytest.raises(ValueError, match="its numbers are complex64, not real"):
        decode(content, 3)
    assert warned(DataConfig(root=write(tmp_path, "0.npy", content))) == ""
    assert "are divided by" not in capsys.readouterr().err


def test_uint8_arrays_are_never_scaled(tmp_path: Path) -> None:
    array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    config = DataConfig(root=write(tmp_path, "0.npy", npy(array)), max_value=4095)
    assert warned(config) == ""
    image, _ = open_dataset(config, "train")[0]
    assert isinstance(image, torch.Tensor)
    assert torch.equal(image, torch.from_numpy(array).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.png", grey(16)), ("a.jpg", encoded(9, "JPEG")), ("a.npy", npy(np.zeros((4, 4, 3), "u1")))],
)
def test_statistics_of_0_to_255_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    config = DataConfig(root=write(tmp_path, name, content), mean=(123.7,) * 3, std=(58.4,) * 3)
    with pytest.raises(UserError, match=r"data.mean .* is above 1: .* divide"):
        open_dataset(config, "train")
    with pytest.raises(UserError, match="is above 1"):
        open_dataset(DataConfig(name="synthetic", std=(58.4,) * 3), "train")


def test_images_and_arrays_of_floats_in_one_batch_are_of_one_scale() -> None:
    # Stacking alone keeps 0 to 255 in a batch of floats, which are not scaled any more.
    image = torch.randint(0, 256, (1, 4, 4), dtype=torch.uint8)
    samples = [Batch(each, torch.rand(2), torch.tensor(0)) for each in (image, image / 255)]
    for order in (samples, samples[::-1]):
        batch = collate(order)
        assert isinstance(batch, Batch)
        first, second = normalise(batch.images, (0.5,), (0.25,))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    pairs = [(image, 1), (image, 2)]
    pixels, labels = collate(pairs)
    assert (pixels.dtype, labels.tolist()) == (torch.uint8, [1, 2])
