"""`crop.method decode`: small crops straight from the files."""

import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from natural_images import jpeg, natural
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import mae_et.data.images.jpeg_crop as crops
from finetune.config import RecipeConfig
from finetune.training.transforms import LabelledTrainDataset
from mae_et import Curriculum, Stage, UserError, low_frequency_crop
from mae_et.config.data import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.images.boxes import Box
from mae_et.data.images.jpeg_crop import (
    BOX_ATTEMPTS,
    coarsest_scale,
    crop_and_resize,
    random_box,
    round_box,
)
from mae_et.data.sampler import SampleIndex
from mae_et.data.sources.synthetic import Synthetic
from mae_et.data.train_dataset import TrainDataset
from mae_et.errors import RunFailed

PLAN = Curriculum((Stage(16, 1, 2), Stage(32, 1, 9)), 32, 8).plan(3, 50, 12)
SCALE, RATIO = (0.2, 1.0), (0.75, 4 / 3)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(12):
        path = tmp_path / "images" / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(natural(90, 120, number)))
    return tmp_path / "images"


def whole(height: int, width: int) -> Box:
    return Box(0, 0, height, width)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (60, 600), (600, 60), (40, 40)])
def test_boxes_have_the_distribution_of_torchvision_and_stay_inside(height, width) -> None:
    torch.manual_seed(0)
    count, empty = 3000, torch.empty(3, height, width)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(empty, list(SCALE), list(RATIO)) for _ in range(count)]
    ).double()
    numbers = torch.rand(count, 4 * BOX_ATTEMPTS, dtype=torch.float64).tolist()
    ours = torch.tensor([random_box(height, width, SCALE, RATIO, row) for row in numbers]).double()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for column in range(4):
        values = torch.cat([ours[:, column], theirs[:, column]]).unique()
        pair = [
            torch.searchsorted(x[:, column].sort()[0], values, right=True) for x in (ours, theirs)
        ]
        distance = (pair[0] - pair[1]).abs().max() / count  # of the distributions
        assert distance < 1.95 * math.sqrt(2 / count)  # Kolmogorov and Smirnov, at 0.1%


@pytest.mark.parametrize("method", ["fourier", "decode"])
def test_crops_depend_on_seed_epoch_and_index_alone(images: Path, method) -> None:
    source = open_dataset(DataConfig(root=images), "train")

    def view(seed: int = 0) -> TrainDataset:
        return TrainDataset(source, DataConfig(), PLAN, 8, seed, method)

    state = torch.get_rng_state()
    first = view()[SampleIndex(3, 1, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    again = pickle.loads(pickle.dumps(view()))[SampleIndex(3, 1, 1)]  # as in a spawned worker
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.noise, again.noise)
    for other in (
        view()[SampleIndex(3, 2, 1)],
        view(1)[SampleIndex(3, 1, 1)],
        view()[SampleIndex(4, 1, 1)],
    ):
        assert not torch.equal(first.images, other.images)
        assert not torch.equal(first.noise, other.noise)


def test_a_crop_has_the_size_of_its_stage_and_the_box_of_its_sample(images: Path) -> None:
    source = open_dataset(DataConfig(root=images), "train")
    view = TrainDataset(source, DataConfig(), PLAN, 8, 0, "decode")
    early, late = view[SampleIndex(3, 0, 0)], view[SampleIndex(3, 0, 1)]
    assert (early.images.shape, late.images.shape) == ((3, 16, 16), (3, 32, 32))
    assert early.images.dtype == torch.uint8
    assert (early.noise.shape, late.noise.shape) == ((4,), (16,))
    smaller = late.images.float().reshape(3, 16, 2, 16, 2).mean((2, 4))
    assert (smaller - early.images).abs().mean() < 8  # other boxes: 40


def test_crops_are_flipped_with_the_configured_probability(images: Path) -> None:
    source = open_dataset(DataConfig(root=images), "train")
    never, always = (
        TrainDataset(source, DataConfig(flip=chance), PLAN, 8, 0, "decode")[SampleIndex(1, 0, 0)]
        for chance in (0, 1)
    )
    assert torch.equal(never.images.flip(-1), always.images)


def test_pillow_and_simplejpeg_agree(monkeypatch) -> None:
    content = jpeg(natural(90, 121))
    fast = crop_and_resize(content, 3, lambda h, w: Box(9, 10, 61, 70), 20)
    monkeypatch.setattr(crops, "simplejpeg", None)
    slow = crop_and_resize(content, 3, lambda h, w: Box(9, 10, 61, 70), 20)
    assert (fast.float() - slow.float()).abs().max() <= 4


def test_the_coarsest_scale_keeps_detail_above_the_crop() -> None:
    scales = [coarsest_scale(Box(0, 0, side, 999), 32) for side in (95, 96, 191, 192, 383, 384)]
    assert scales == [1, 2, 2, 4, 4, 8]


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("P", "GIF"), ("RGB", "WEBP"), ("RGB", "JPEG"),
     ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "BMP"), ("I;16", "PNG")],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_crops_equal_the_resized_full_image_for_every_format(
    mode: str, kind: str, channels: int, without: bool, monkeypatch
) -> None:
    if without:
        monkeypatch.setattr(crops, "simplejpeg", None)
    image = natural(64, 96)
    image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    found = crop_and_resize(file.getvalue(), channels, whole, 24)
    assert (found.shape, found.dtype) == ((channels, 24, 24), torch.uint8)
    expected = crops._tensor(
        np.array(crops.to_channels(Image.open(file), channels).resize((24, 24), Image.BICUBIC))
    )
    assert (found.float() - expected.float()).abs().mean() < 2.5


def test_crops_ignore_exif_rotation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = natural(64, 96)
    plain, tagged = (
        crop_and_resize(content, 3, whole, 24) for content in (jpeg(image), jpeg(image, exif=exif))
    )
    assert torch.equal(plain, tagged)


def test_array_crops_keep_their_type_and_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "0.npy", np.ones((40, 50, 5), np.float32))
    view = TrainDataset(
        open_dataset(DataConfig(root=tmp_path), "train", 5), DataConfig(), PLAN, 8, 0, "decode"
    )
    assert view[SampleIndex(0, 0, 0)].images.dtype == torch.float32
    (tmp_path / "train" / "1.jpg").write_bytes(jpeg(natural(64, 64))[:900])
    view = TrainDataset(
        open_dataset(DataConfig(root=tmp_path), "train"), DataConfig(), PLAN, 8, 0, "decode"
    )
    with pytest.raises(RunFailed, match=r"cannot read the image .*1\.jpg"):
        view[SampleIndex(1, 0, 0)]


def test_decoded_crops_of_undecoded_datasets_are_refused() -> None:
    with pytest.raises(UserError, match=r"crop\.method decode"):
        TrainDataset(Synthetic(50, 32), DataConfig(), PLAN, 8, 0, "decode")


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * ((a.float() - b.float()) / 255).square().mean().log10().item()


@pytest.mark.parametrize("size", [48, 80])
def test_decoded_crops_are_as_close_to_the_exact_crop_as_lanczos(size: int) -> None:
    """Within half a decibel, as the mean of some images."""
    found = []
    for seed in range(6):
        image = natural(280, 360, seed)
        box = Box(8 * seed, 16, 232, 216)
        corners = (box.left, box.top, box.left + box.width, box.top + box.height)
        base = image.resize((112, 112), Image.Resampling.BICUBIC, box=corners)
        exact = 255 * low_frequency_crop(crops._tensor(np.array(base)).float() / 255, size)
        lanczos = crops._tensor(np.array(base.resize((size, size), Image.Resampling.LANCZOS)))
        content = jpeg(image)
        decoded = crop_and_resize(content, 3, lambda h, w, box=box: box, size)
        found.append((psnr(lanczos, exact), psnr(decoded, exact)))
    theirs, ours = np.mean(found, axis=0)
    assert ours > theirs - 0.5


def test_decoded_crops_are_augmented_at_their_size(images: Path) -> None:
    source = open_dataset(DataConfig(root=images), "train")
    config = DataConfig(augment="rand-inc1")
    view = TrainDataset(source, config, PLAN, 8, 0, "decode")
    again = TrainDataset(source, config, PLAN, 8, 0, "decode")
    plain = TrainDataset(source, DataConfig(), PLAN, 8, 0, "decode")
    draws = [SampleIndex(i, 0, 1) for i in range(6)]
    assert all(torch.equal(view[d].images, again[d].images) for d in draws)
    assert any(not torch.equal(view[d].images, plain[d].images) for d in draws)
    assert view[draws[0]].images.shape == (3, 32, 32)


def test_classifiers_train_on_decoded_crops(images: Path) -> None:
    source = open_dataset(DataConfig(root=images), "train")
    recipe = RecipeConfig(erasing=0.999)
    view = LabelledTrainDataset(source, DataConfig(), recipe, PLAN, 0, method="decode")
    assert view[SampleIndex(2, 0, 0)].images.shape == (3, 16, 16)
    assert view[SampleIndex(2, 0, 1)].images.shape == (3, 32, 32)
    assert {int(view[SampleIndex(i, 0, 0)].labels) for i in range(12)} == {0, 1}
    assert torch.equal(view[SampleIndex(2, 0, 0)].images, view[SampleIndex(2, 0, 0)].images)


def test_pixel_box_stays_inside_the_image_and_is_never_empty() -> None:
    assert round_box(Box(1.4, 2.6, 3, 4), 10, 10) == (1, 3, 3, 4)
    assert round_box(Box(9.9, 9.9, 0.1, 0.1), 10, 10) == (9, 9, 1, 1)
