"""Files decode to images of the requested channels."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import folder, refusal, save
from PIL import Image
from torch.utils.data import DataLoader

from mae_et.config.data import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.sources.image_folder import ImageFolder
from mae_et.data.transforms import EvalDataset
from mae_et.errors import RunFailed, UserError


def read_one(path: Path, channels: int) -> Image.Image | torch.Tensor:
    return ImageFolder([path], [0], [], channels)[0][0]


@pytest.mark.filterwarnings("ignore:.*give data.max_value")
@pytest.mark.parametrize("channels", [1, 2, 5, 13])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float64"])
def test_arrays_of_any_channels_become_views(tmp_path: Path, channels: int, kind: str) -> None:
    array = (np.random.default_rng(0).random((40, 32, channels)) * 250).astype(kind)
    np.save(tmp_path / "0.npy", array)
    save(tmp_path / "preview.png")  # an image file has no 13 channels
    if channels == 1:
        (tmp_path / "preview.png").unlink()
        np.save(tmp_path / "0.npy", array[..., 0])
    source = open_dataset(folder(tmp_path), "train", channels)
    image, label = source[0]
    assert len(source) == 1
    assert isinstance(image, torch.Tensor)
    assert image.dtype == (torch.uint8 if kind == "uint8" else torch.float32)
    np.testing.assert_array_equal(
        image.numpy(), array.astype(image.numpy().dtype).transpose(2, 0, 1)
    )
    view, _ = EvalDataset(source, DataConfig(), 16)[0]
    assert view.shape == (channels, 16, 16)
    assert label == -1


def test_arrays_of_other_shapes_are_refused(tmp_path: Path) -> None:
    for shape in ((4, 4, 5), (4,), (2, 4, 4, 3), (3, 4, 4)):
        np.save(tmp_path / "array.npy", np.zeros(shape))
        with pytest.raises(RunFailed, match=r"array\.npy: an array of shape .* of 3 channels"):
            read_one(tmp_path / "array.npy", 3)


def test_image_files_are_refused_for_channels_they_cannot_have(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    assert "(of 13 channels: .npy)" in refusal(folder(tmp_path), channels=13)
    assert "model.channels 2 needs arrays" in refusal(DataConfig(), channels=2)
    with pytest.raises(UserError, match=r"model\.channels 5 needs arrays"):
        read_one(tmp_path / "0.png", 5)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, channels: int, suffix: str) -> None:
    grey = np.array([[0, 255, 256, 0x7FFF], [0x8000, 0xFEFF, 0xFF00, 0xFFFF]], np.uint16)
    Image.fromarray(grey).save(
        tmp_path / f"deep{suffix}", format="PPM" if suffix == ".pgm" else None
    )
    image = read_one(tmp_path / f"deep{suffix}", channels)
    assert isinstance(image, Image.Image)
    pixels = np.asarray(image).reshape(2, 4, channels)
    for channel in range(min(channels, 3)):
        assert pixels[..., channel].tolist() == [[0, 0, 1, 127], [128, 254, 255, 255]]
    assert channels < 4 or (pixels[..., 3] == 255).all()


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=bytes([0, 128]))
    rgb, rgba = read_one(tmp_path / "palette.png", 3), read_one(tmp_path / "palette.png", 4)
    assert np.asarray(rgb).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert np.asarray(rgba).tolist() == [[[10, 20, 30, 0], [200, 100, 50, 128]]]


def test_every_mode_converts_as_in_torchvision(tmp_path: Path) -> None:
    made = {
        "cmyk.jpg": Image.new("CMYK", (8, 8), (10, 200, 30, 40)),
        "grey-alpha.png": Image.new("LA", (8, 8), (77, 20)),
        "bits.png": Image.new("1", (8, 8), 1),
        "alpha.webp": Image.new("RGBA", (8, 8), (1, 2, 3, 255)),
        "grey.bmp": Image.new("L", (8, 8), 9),
    }
    for name, image in made.items():
        image.save(tmp_path / name)
        ours = read_one(tmp_path / name, 3)
        assert isinstance(ours, Image.Image)
        assert ours.mode == "RGB"
        assert ours.tobytes() == Image.open(tmp_path / name).convert("RGB").tobytes()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lab_images_convert_to_any_channels(channels: int, tmp_path: Path) -> None:
    """PIL converts them to RGB alone."""
    Image.new("LAB", (4, 4), (255, 128, 128)).save(tmp_path / "white.tif")
    assert np.asarray(read_one(tmp_path / "white.tif", channels)).min() >= 254


def test_exif_rotation_is_ignored_as_in_mae(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "photo.jpg", exif=exif)
    image = read_one(tmp_path / "photo.jpg", 3)
    assert isinstance(image, Image.Image)
    assert image.size == (6, 4)


def test_a_dataset_survives_pickling_and_workers(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / f"{i}.png", i)
    source = pickle.loads(pickle.dumps(open_dataset(folder(tmp_path, "."), "train", 1)))
    loader = DataLoader(EvalDataset(source, DataConfig(eval_crop=1.0), 4), 2, num_workers=1)
    assert [int(image[0, 0, 0]) for images, _ in loader for image in images] == [0, 1, 2, 3]
