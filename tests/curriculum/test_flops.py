from functools import partial

import pytest
import timm
import torch
from oracles import mae_flops
from torch.utils.flop_counter import FlopCounterMode

from mae_et.config.model import ModelConfig
from mae_et.curriculum.flops import training_flops
from mae_et.curriculum.mae_cost import ENCODERS, mae_training_flops
from mae_et.models.mae import MaskedAutoencoder


def test_flops_equal_a_count_by_hand() -> None:
    width, depth, decoder, patch = 32, 2, 16, 8
    with torch.device("meta"):
        model = MaskedAutoencoder(
            "vit_tiny_patch16_224", 64, patch, 3, width, depth, 2, decoder, 1, 2
        )
    counted = training_flops(partial(model, every_patch=True))(64)
    assert counted == mae_flops(64, patch, width, depth, decoder, 1)


@pytest.mark.parametrize(
    "settings",
    [{"encoder": "vit_tiny_patch16_224", "image_size": 96},
     {"encoder_depth": 2, "encoder_embed_dim": 96, "encoder_num_heads": 3, "image_size": 64,
      "patch_size": 8, "mask_ratio": 0.6, "channels": 4, "target": "hog"}],
)  # fmt: skip
def test_flops_from_sizes_are_those_counted_in_the_network(settings: dict) -> None:
    config = ModelConfig(**settings)
    known = mae_training_flops(config)
    with torch.device("meta"):
        model = MaskedAutoencoder.from_config(config)
    counted = training_flops(partial(model, every_patch=True), config.channels)
    assert known is not None
    assert known(config.image_size) == counted(config.image_size)


@pytest.mark.parametrize(
    ("encoder", "saved"),
    [("vit_tiny_patch16_224", 0.0238), ("vit_small_patch16_224", 0.021),
     ("vit_base_patch16_224", 0.014)],
)  # fmt: skip
def test_training_skips_as_many_flops_as_the_pages_say(encoder: str, saved: float) -> None:
    """Plans count the published decoder, which predicts every patch."""
    config = ModelConfig(encoder=encoder)
    known = mae_training_flops(config)
    assert known is not None
    with torch.device("meta"):
        model = MaskedAutoencoder.from_config(config)
    for bandwidth in (96, 224):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, bandwidth, bandwidth, device="meta")).loss.backward()
        assert 1 - counter.get_total_flops() / known(bandwidth) == pytest.approx(saved, abs=1.5e-3)


def test_sizes_of_encoders_are_timm_s() -> None:
    for name, sizes in ENCODERS.items():
        with torch.device("meta"):
            vit = timm.create_model(name)
        assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == sizes


def test_flops_of_what_only_the_network_tells_are_not_guessed() -> None:
    for other in (
        {"encoder": "vit_giant_patch14_224"}, {"decoder_attention": "cross"},
        {"decoder_share": 0.5}, {"encoder_num_heads": 7},
    ):  # fmt: skip
        assert mae_training_flops(ModelConfig(**other)) is None


def test_cost_ratios_of_mae_vit_b_equal_reference_measurements() -> None:
    """Ratios to 224 px, counted on a reference implementation to three digits."""
    flops = mae_training_flops(ModelConfig(encoder="vit_base_patch16_224"))
    assert flops is not None
    for bandwidth, ratio in {96: 0.187, 112: 0.249, 128: 0.326, 160: 0.507, 192: 0.730}.items():
        assert flops(bandwidth) / flops(224) == pytest.approx(ratio, abs=1.5e-3)
