import pytest
import torch
from oracles import mae_flops

from mae_et.curriculum.flops import training_flops
from mae_et.models.mae import MaskedAutoencoder


def test_flops_equal_a_count_by_hand() -> None:
    width, depth, decoder, patch = 32, 2, 16, 8
    with torch.device("meta"):
        model = MaskedAutoencoder(
            "vit_tiny_patch16_224", 64, patch, 3, width, depth, 2, decoder, 1, 2
        )
    assert training_flops(model)(64) == mae_flops(64, patch, width, depth, decoder, 1)


def test_cost_ratios_of_mae_vit_b_equal_reference_measurements() -> None:
    """Ratios to 224 px, counted on a reference implementation to three digits."""
    with torch.device("meta"):
        flops = training_flops(MaskedAutoencoder("vit_base_patch16_224"))
    for bandwidth, ratio in {96: 0.187, 112: 0.249, 128: 0.326, 160: 0.507, 192: 0.730}.items():
        assert flops(bandwidth) / flops(224) == pytest.approx(ratio, abs=1.5e-3)
