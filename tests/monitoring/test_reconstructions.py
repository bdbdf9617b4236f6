import math
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from mae_et import pretrain
from mae_et.config.commands import ReconstructConfig
from mae_et.config.data import DataConfig
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.masking import mask_from_noise
from mae_et.models.targets import hog, hog_strokes
from mae_et.monitoring.image_grid import save_png
from mae_et.monitoring.reconstructions import panel_grid, reconstruction_panels
from mae_et.reconstruction import reconstruct

DATA = DataConfig(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def model(target: str, channels: int = 3) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(
        "vit_tiny_patch16_224", 32, 8, channels, 32, 1, 2, 16, 1, 2, target=target, hog_cell=4
    )


@pytest.mark.parametrize("target", ["pixel", "norm_pix"])
def test_a_perfect_prediction_draws_the_input(target: str) -> None:
    """Also a norm_pix prediction, with each patch's mean and deviation restored."""
    perfect = model(target)
    shown = torch.rand(2, 3, 32, 24)
    statistics = torch.tensor([DATA.mean, DATA.std])[..., None, None]
    images = (shown - statistics[0]) / statistics[1]
    perfect.decoder.forward = lambda *_: perfect.targets(images)  # type: ignore[union-attr]
    panels = reconstruction_panels(perfect, images, mask_from_noise(torch.rand(2, 12), 0.75), DATA)
    assert panels.shape == (2, 4, 3, 32, 24)
    for panel in (0, 2, 3):
        torch.testing.assert_close(panels[:, panel], shown, rtol=0, atol=1e-4)
    masked = (panels[:, 1] == 0.5).all(1).float().mean()
    assert masked == pytest.approx(0.75, abs=0.01)


def test_a_run_is_reconstructed_with_its_own_mask_ratio(tiny, tmp_path: Path) -> None:
    run = pretrain(tiny("--model.mask_ratio=0.5"), stop_after_step=1)
    given: dict = {"checkpoint": run, "count": 1, "device": "cpu"}
    first = reconstruct(ReconstructConfig(**given, output=tmp_path / "a.png"))
    again = reconstruct(ReconstructConfig(**given, output=tmp_path / "b.png", mask_ratio=0.5))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(("channels", "mean"), [(1, (0.5,)), (5, (0.5,))])
def test_other_channels_are_shown_as_rgb(channels: int, mean: tuple[float, ...]) -> None:
    data = DataConfig(mean=mean, std=mean)
    images, mask = torch.randn(1, channels, 32, 32), mask_from_noise(torch.rand(1, 16), 0.5)
    panels = reconstruction_panels(model("hog", channels), images, mask, data)
    assert panels.shape == (1, 4, 3, 32, 32)
    assert panels.min() >= 0
    assert panels.max() <= 1


@pytest.mark.parametrize("angle", [0, 45, 90, 135])
def test_strokes_run_along_the_edges(angle: int) -> None:
    """The strokes of a grating vary across its stripes and not along them."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    radians = math.radians(angle)
    grating = torch.sin((x * math.cos(radians) + y * math.sin(radians)) / 1.5)
    drawn = hog_strokes(hog(grating[None, None]), 8)[0, 0, 16:48, 16:48]
    along = (round(-math.sin(radians)), round(math.cos(radians)))
    across = (along[1], -along[0])

    def change(step: tuple[int, int]) -> float:
        return (drawn - drawn.roll((step[1], step[0]), (0, 1)))[1:-1, 1:-1].abs().mean().item()

    assert change(along) < 0.5 * change(across)


def test_small_images_are_enlarged_by_an_integer_factor() -> None:
    panels = torch.rand(2, 4, 3, 40, 40)
    image = panel_grid(panels, "pixel")
    laid_out = image[:, -(2 * 124 + 4) :]
    assert laid_out.shape == (3, 2 * 124 + 4, 4 * 124 + 4)
    first = laid_out[:, 4:124, 4:124].float() / 255
    torch.testing.assert_close(first[:, ::3, ::3], panels[0, 0], rtol=0, atol=0.003)


def test_each_column_has_a_caption_that_fits_its_panel() -> None:
    """Dark pixels above each panel, none between the panels, and others for another target."""
    panels = torch.rand(1, 4, 3, 96, 96)
    pixel, hog = (panel_grid(panels, target)[:, : -(96 + 8)] for target in ("norm_pix", "hog"))
    assert pixel.shape == hog.shape
    assert not torch.equal(pixel, hog)
    for captions in (pixel, hog):
        dark = (captions < 128).any(0).any(0)  # [W]
        for place in range(4):
            left = 4 + place * 100
            assert dark[left : left + 96].sum() > 10
            assert not dark[left - 4 : left].any()


def test_an_image_is_saved_as_it_is_and_without_warnings(tmp_path: Path) -> None:
    """Newer versions of torchvision warn that they will remove their PNG encoder."""
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_png(tmp_path / "a.png", image)
    assert torch.equal(pil_to_tensor(Image.open(tmp_path / "a.png")), image)
