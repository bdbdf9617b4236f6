from pathlib import Path

import pytest
import torch
from tiny_run import GOLDEN

from mae_et import UserError, load_encoder, load_pretrained

ROOT = str(Path(__file__).parents[2])
GOLDEN_MAE = str(GOLDEN / "mae_tiny_released_format.pth")


def load(entry: str, *arguments, **settings) -> torch.nn.Module:
    return torch.hub.load(ROOT, entry, *arguments, source="local", trust_repo=True, **settings)


def test_a_checkpoint_loads_through_torch_hub_as_by_the_library() -> None:
    model = load("masked_autoencoder", GOLDEN_MAE, encoder_num_heads=3, decoder_num_heads=4)
    same = load_pretrained(GOLDEN_MAE, encoder_num_heads=3, decoder_num_heads=4)
    encoder = load("mae_encoder", GOLDEN_MAE, encoder_num_heads=3)
    images = torch.randn(2, model.channels, *(side * model.patch for side in model.base_grid))
    assert torch.equal(model.encode(images), same.encode(images))
    features = load_encoder(GOLDEN_MAE, encoder_num_heads=3).forward_features(images)
    assert torch.equal(encoder.forward_features(images), features)
    assert not encoder.training


def test_networks_without_weights_take_settings() -> None:
    encoder = load("mae_encoder", "vit_tiny_patch16_224", pretrained=False, img_size=32, depth=1)
    assert encoder.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 5, 192)
    model = load(
        "masked_autoencoder", "vit_tiny_patch16_224", pretrained=False, image_size=32,
        decoder_depth=0,
    )  # fmt: skip
    assert model.base_grid == (2, 2)
    with pytest.raises(UserError, match="pretrained=False"):
        load("masked_autoencoder")
