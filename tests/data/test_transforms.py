import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from mae_et import Curriculum, Stage, UserError
from mae_et.config.data import DataConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.sampler import SampleIndex
from mae_et.data.sources.synthetic import Synthetic
from mae_et.data.train_dataset import TrainDataset
from mae_et.data.transforms import (
    EvalDataset,
    as_tensor,
    augmentation,
    flip_again,
    normalise,
    seeded,
    training_transform,
)

PLAN = Curriculum((Stage(16, 1, 2), Stage(32, 1, 9)), 32, 8).plan(3, 50, 12)
SOURCE = Synthetic(50, 32)


def view(augment: str | None = None, seed: int = 0, plan: Plan = PLAN) -> TrainDataset:
    return TrainDataset(SOURCE, DataConfig(augment=augment), plan, 8, seed)


def test_a_sample_keeps_its_crop_and_gets_noise_for_each_stages_grid() -> None:
    early, late = view()[SampleIndex(3, 0, 0)], view()[SampleIndex(3, 0, 1)]
    assert torch.equal(early.images, late.images)
    assert early.images.dtype == torch.uint8
    assert early.images.shape == (3, 32, 32)
    assert (early.noise.shape, late.noise.shape) == ((4,), (16,))


@pytest.mark.parametrize("size", [32, 60])
@pytest.mark.parametrize("crop", [0.875, 0.9, 32 / 35, 0.95, 1.0])
def test_the_evaluation_view_and_its_statistics_are_timm_s(size: int, crop: float) -> None:
    """60 at 0.95 is resized to 63, rounded down; 32 of 35 to 35 whatever the quotient."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert DataConfig().mean == IMAGENET_DEFAULT_MEAN
    assert DataConfig().std == IMAGENET_DEFAULT_STD
    ours = EvalDataset([(image, 0)], DataConfig(eval_crop=crop), size)[0][0]
    settings = {"crop_pct": crop, "interpolation": "bicubic", "normalize": False}
    theirs = create_transform((3, size, size), **settings)(image)
    assert torch.equal(ours, theirs)
    array = EvalDataset([(as_tensor(image), 0)], DataConfig(eval_crop=crop), size)[0][0]
    assert (array.float() - ours.float()).abs().mean() < 1  # antialiased alike


def test_the_highest_magnitude_posterizes_to_black() -> None:
    """Magnitude 9 reaches it by its deviation: once in 500 images, in every published recipe."""
    image = Image.new("RGB", (4, 4), (200, 100, 0))
    transform = augmentation(DataConfig(augment="rand-inc1"), 10)[-1]
    posterize = next(each for each in transform.ops if each.name == "PosterizeIncreasing")
    posterize.prob = 1.0
    assert posterize(image).getextrema() == ((0, 0),) * 3


def test_one_mean_for_all_channels_fills_augmented_images() -> None:
    image = Image.new("RGB", (32, 32), (200, 100, 0))
    views = []
    for mean in ((0.5,), (0.5, 0.5, 0.5)):
        config = DataConfig(augment="rand", mean=mean, std=mean)
        with seeded(1):
            views.append([as_tensor(training_transform(config, 32, 9)(image)) for _ in range(8)])
    assert all(map(torch.equal, *views))


def test_augmentation_has_the_magnitude_of_the_stage() -> None:
    """At magnitude 0 RandAugment's operations do little."""
    plan = Curriculum((Stage(16, 1, 0), Stage(32, 1, 10)), 32, 8).plan(3, 50, 12)
    plain, augmented = view(plan=plan), view("rand-inc1", plan=plan)

    def change(stage: int) -> float:
        pairs = [
            (v[SampleIndex(i, 0, stage)].images.float() for v in (plain, augmented))
            for i in range(30)
        ]
        return float(np.mean([(a - b).abs().mean() for a, b in pairs]))

    assert change(stage=1) > 1.3 * change(stage=0)


@pytest.mark.parametrize("augment", ["rand-foo1", "rand-n2.5"])
def test_an_unknown_augmentation_is_refused(augment: str) -> None:
    with pytest.raises(UserError, match=r"timm has no augmentation 'rand-m2-"):
        view(augment)


def test_seeding_restores_the_global_generators() -> None:
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.rand(1).item(), random.random()
    torch.manual_seed(0)
    random.seed(0)
    with seeded(5):
        drawn = torch.rand(1).item()
    assert (torch.rand(1).item(), random.random()) == expected
    with seeded(5):
        assert torch.rand(1).item() == drawn
        numbers = np.random.random(2)  # noqa: NPY002
    with seeded(5):
        assert np.random.random() == numbers[0]  # noqa: NPY002
        with seeded(5, numpy=False):
            assert np.random.random() == numbers[1]  # noqa: NPY002


def test_normalise_applies_mean_and_std() -> None:
    images = torch.randint(0, 256, (4, 2, 8, 8), dtype=torch.uint8)
    ours = normalise(images, (0.5, 0.1), (0.25, 2.0))
    torch.testing.assert_close(ours[:, 1], (images[:, 1] / 255 - 0.1) / 2.0)
    floats = torch.rand(1, 2, 4, 4)
    torch.testing.assert_close(normalise(floats, (0.5,), (0.5,)), (floats - 0.5) / 0.5)
    for mean, std in (((0.5,), (0.5, 0.5)), ((0.5,) * 3, (0.5,) * 3)):
        with pytest.raises(ValueError, match="one number, or one for each of 2 channels"):
            normalise(floats, mean, std)


def test_replayed_images_are_flipped_again_only_if_the_flip_probability_is_a_half() -> None:
    images = torch.arange(48.0).view(8, 1, 2, 3)
    marked = torch.arange(8) % 2 == 0
    flipped = flip_again(images, marked, 0.5, torch.Generator().manual_seed(1))
    changed = (flipped != images).flatten(1).any(1)
    assert changed.any()
    assert not changed[~marked].any()
    assert torch.equal(flipped[changed], images[changed].flip(-1))
    assert flip_again(images, marked, 0.3, torch.Generator()) is images
