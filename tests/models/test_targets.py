import pytest
import torch
from safetensors.torch import load_file
from tiny_run import GOLDEN

from mae_et import UserError, hog
from mae_et.config.model import ModelConfig, Target
from mae_et.models.targets import TARGETS, PatchTarget, hog_strokes, patch_statistics


def target_of(kind: Target, patch: int, **settings: int) -> PatchTarget:
    config = ModelConfig(image_size=patch, patch_size=patch, target=kind, **settings)
    return TARGETS[kind](config)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def test_hog_equals_the_maskfeat_golden_file() -> None:
    golden = load_file(GOLDEN / "hog_maskfeat_expected.safetensors")
    images = golden["images_normalized"]
    expected_cells = golden["hog_cells_B_C_bins_h_w"]
    torch.testing.assert_close(hog(images), expected_cells, rtol=1e-5, atol=1e-6)
    targets = target_of("hog", 16).compute(images)
    torch.testing.assert_close(targets, golden["hog_patch_targets_patch16"], rtol=1e-5, atol=1e-6)


def test_hog_runs_in_float32_under_autocast(images: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = hog(images)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, hog(images))
    assert torch.equal(hog(images.bfloat16()), hog(images.bfloat16().float()))


def test_histograms_have_unit_norm_and_ignore_contrast(images: torch.Tensor) -> None:
    histogram = hog(images)
    norms = histogram.norm(dim=2)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    torch.testing.assert_close(hog(7 * images + 3), histogram, rtol=1e-4, atol=1e-4)


def test_flat_image_gives_zeros_without_nan() -> None:
    assert torch.equal(hog(torch.full((1, 3, 16, 16), 0.5)), torch.zeros(1, 3, 9, 2, 2))
    assert hog(torch.full((1, 3, 16, 16), 0.7)).isfinite().all()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_hog_supports_any_number_of_channels_and_any_cell(channels: int) -> None:
    x = torch.rand(2, channels, 28, 42)
    assert hog(x, cell=7, bins=6).shape == (2, channels, 6, 4, 6)
    assert hog(x, cell=1, bins=1).shape == (2, channels, 1, 28, 42)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("channels", [1, 4])
def test_the_config_knows_the_size_of_a_target(kind: Target, channels: int) -> None:
    config = ModelConfig(patch_size=14, channels=channels, target=kind, hog_cell=7, hog_bins=6)
    targets = TARGETS[kind](config).compute(torch.rand(2, channels, 28, 42))
    assert targets.shape == (2, 6, config.target_width)


def test_pictures_of_the_targets_are_those_of_the_images(images: torch.Tensor) -> None:
    pixel, hogs = target_of("pixel", 8), target_of("hog", 16)
    assert torch.equal(pixel.picture(pixel.compute(images), images), images)
    assert torch.equal(hogs.picture(hogs.compute(images), images), hog_strokes(hog(images), 8))


def test_pixels_of_a_patch_are_ordered_row_column_channel(images: torch.Tensor) -> None:
    patches = target_of("pixel", 16).compute(images).view(2, 2, 3, 16, 16, 3)
    assert patches[1, 1, 2, 5, 7, 2] == images[1, 2, 16 + 5, 32 + 7]


def test_norm_pix_has_mean_zero_and_unbiased_variance_one(images: torch.Tensor) -> None:
    target = target_of("norm_pix", 8).compute(images)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 24), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 24), rtol=0, atol=1e-4)
    patches = target_of("pixel", 8).compute(images)
    mean, deviation = patch_statistics(patches)
    torch.testing.assert_close(target * deviation + mean, patches)


def test_images_not_tiled_by_patches_or_cells_raise(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not tiled by patches of 9"):
        target_of("pixel", 9).compute(images)
    with pytest.raises(ValueError, match="not tiled by HOG cells of 5"):
        hog(images, cell=5)
    with pytest.raises(UserError, match="hog_cell 16 does not divide the patch size 8"):
        target_of("hog", 8, hog_cell=16)
