"""Augmentation of labelled images: what is erased and mixed, and at which size."""

import pytest
import torch
from natural_images import jpeg, natural

from finetune.config import RecipeConfig
from finetune.training.transforms import LabelledTrainDataset, mix
from mae_et import Curriculum, Stage, low_frequency_crop
from mae_et.config.data import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.sampler import SampleIndex
from mae_et.data.sources.synthetic import Synthetic

PLAN = Curriculum((Stage(32, 1), Stage(48, 1), Stage(64, 1)), 64).plan(3, 20, 4)
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}


@pytest.fixture
def jpegs(tmp_path):
    """Return the config of a folder of JPEG files, which every crop method reads."""
    for number in range(20):
        path = tmp_path / "jpegs" / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(natural(64, 64, number)))
    return DataConfig(root=tmp_path / "jpegs", **WHOLE)


def test_labels_are_mixed_as_images_are() -> None:
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).clone()
    labels = torch.tensor([0, 1, 2, 3])
    mixed, targets = mix(images.clone(), labels, RecipeConfig(mixup=0.8), 5, seed=3)
    share = targets.max(1).values[0]
    assert share < 1
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    expected = share * torch.arange(4.0) + (1 - share) * torch.arange(4.0).flip(0)
    flipped = (1 - share) * torch.arange(4.0) + share * torch.arange(4.0).flip(0)
    found = mixed[:, 0, 0, 0]
    assert torch.allclose(found, expected) or torch.allclose(found, flipped)
    same = mix(images.clone(), labels, RecipeConfig(mixup=0.8), 5, seed=3)[0]
    assert torch.equal(same, mixed)
    smoothed = mix(images.clone(), labels, RecipeConfig(mixup=0.8, smoothing=0.1), 5, seed=3)[1]
    torch.testing.assert_close(smoothed, 0.9 * targets + 0.1 / 5)
    plain, hot = mix(images, labels, RecipeConfig(smoothing=0.1), 5, seed=0)
    assert torch.equal(plain, images)
    assert hot[2].tolist() == pytest.approx([0.02, 0.02, 0.92, 0.02, 0.02])


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("method", ["resize", "fourier", "decode"])
def test_erased_pixels_are_noise_of_unit_variance_at_every_bandwidth(
    jpegs: DataConfig, method, stage: int
) -> None:
    """Erased after the reduction: reduced noise would have .35 to .85 of the deviation."""
    source = open_dataset(jpegs, "train")
    whole, erased = (
        LabelledTrainDataset(source, jpegs, RecipeConfig(erasing=share), PLAN, 0, method=method)
        for share in (0.0, 0.999)
    )
    draws = [SampleIndex(number, epoch, stage) for number in range(20) for epoch in range(3)]
    before, after = (
        torch.stack([dataset[draw].images for draw in draws]) for dataset in (whole, erased)
    )
    side = PLAN.stages[stage].bandwidth
    assert after.shape == (60, 3, side, side)
    changed = (before != after).any(dim=1, keepdim=True).expand_as(after)
    assert 0.02 < changed.float().mean() < 0.4
    noise = after[changed]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


@pytest.mark.parametrize("method", ["resize", "fourier"])
def test_images_are_reduced_as_a_batch_on_the_device_would_be(method) -> None:
    data = DataConfig(**WHOLE)
    dataset = LabelledTrainDataset(Synthetic(20, 64), data, RecipeConfig(), PLAN, 0, method=method)
    for stage, planned in enumerate(PLAN.stages):
        full = dataset[SampleIndex(3, 0, 2)].images
        found = dataset[SampleIndex(3, 0, stage)].images
        expected = low_frequency_crop(full, planned.bandwidth, method)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert full.shape[-2:] == (64, 64)


def test_a_rectangle_has_its_own_size_at_each_stage() -> None:
    sizes = [(32, 64), (48, 96), (64, 128)]
    dataset = LabelledTrainDataset(
        Synthetic(20, 64), DataConfig(), RecipeConfig(erasing=0.5), PLAN, 0, (64, 128), sizes=sizes
    )
    for stage, size in enumerate(sizes):
        assert dataset[SampleIndex(0, 0, stage)].images.shape[-2:] == size


def test_augmentation_is_a_function_of_seed_epoch_and_sample() -> None:
    dataset = LabelledTrainDataset(
        Synthetic(20, 64), DataConfig(), RecipeConfig(erasing=0.999), PLAN, 0
    )
    first, again = (dataset[SampleIndex(3, 1, 0)].images for _ in range(2))
    assert torch.equal(first, again)
    for other in (SampleIndex(3, 2, 0), SampleIndex(4, 1, 0)):
        assert not torch.equal(first, dataset[other].images)
