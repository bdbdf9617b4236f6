import pytest
import torch
from safetensors.torch import load_file
from tiny_run import GOLDEN

from mae_et import hog
from mae_et.config.model import target_width
from mae_et.models.targets import (
    hog_cells,
    hog_patches,
    patch_statistics,
    patch_targets,
    patchify,
    unpatchify,
)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def test_hog_equals_the_maskfeat_golden_file() -> None:
    golden = load_file(GOLDEN / "hog_maskfeat_expected.safetensors")
    images = golden["images_normalized"]
    expected_cells = golden["hog_cells_B_C_bins_h_w"]
    torch.testing.assert_close(hog(images), expected_cells, rtol=1e-5, atol=1e-6)
    targets = patch_targets("hog", images, patch=16)
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
    assert patch_targets("hog", x, 14, cell=7, bins=6).shape == (
        2, 6, target_width("hog", 14, channels, 7, 6),
    )  # fmt: skip


def test_layouts_have_inverses(images: torch.Tensor) -> None:
    assert torch.equal(unpatchify(patchify(images, 8), (4, 6), 8), images)
    cells = hog(images)
    assert torch.equal(hog_cells(hog_patches(cells, 2), (2, 3), 2, 9), cells)


def test_pixels_of_a_patch_are_ordered_row_column_channel(images: torch.Tensor) -> None:
    patches = patchify(images, 16).view(2, 2, 3, 16, 16, 3)
    assert patches[1, 1, 2, 5, 7, 2] == images[1, 2, 16 + 5, 32 + 7]


def test_norm_pix_has_mean_zero_and_unbiased_variance_one(images: torch.Tensor) -> None:
    target = patch_targets("norm_pix", images, 8)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 24), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 24), rtol=0, atol=1e-4)
    mean, deviation = patch_statistics(patchify(images, 8))
    torch.testing.assert_close(target * deviation + mean, patchify(images, 8))


def test_targets_of_any_dtype_are_float32_without_gradient(images: torch.Tensor) -> None:
    for kind in ("pixel", "norm_pix", "hog"):
        target = patch_targets(kind, images.bfloat16().requires_grad_(), 16)
        assert target.dtype == torch.float32
        assert not target.requires_grad


def test_images_not_tiled_by_patches_or_cells_raise(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not tiled by patches of 9"):
        patchify(images, 9)
    with pytest.raises(ValueError, match="not tiled by HOG cells of 5"):
        hog(images, cell=5)
    with pytest.raises(ValueError, match="do not tile a patch of 8"):
        patch_targets("hog", images, 8, cell=16)
    with pytest.raises(ValueError, match="pixel, norm_pix, hog"):
        patch_targets("edges", images, 8)  # type: ignore[arg-type]
