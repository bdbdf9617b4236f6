import json
import math

import pytest
import torch
from tiny_run import GOLDEN

from finetune.config import ClassifierOptimConfig
from mae_et import UserError
from mae_et.config.schema import OptimConfig
from mae_et.models.mae import MaskedAutoencoder
from mae_et.training.optim import build_optimizer, lr_at, peak_scale, set_schedule, weight_decay_at

RECIPE = OptimConfig()


def test_the_learning_rate_is_mae_s_schedule_over_compute() -> None:
    """40 of 800 epochs of warm-up, then half a cosine to 0, peak 1.5e-4 * 4096 / 256."""
    points = json.loads((GOLDEN / "mae_cosine_lr.json").read_text())
    assert len(points) > 5
    for epoch, expected in points:
        assert lr_at(epoch / 800, RECIPE) == pytest.approx(expected, rel=1e-9, abs=1e-15)
        # Twice the peak, half of it as the floor: the same cosine, on the floor.
        raised = OptimConfig(base_lr=2 * RECIPE.base_lr, min_lr=RECIPE.lr)
        floor = RECIPE.lr if epoch >= 40 else expected
        assert lr_at(epoch / 800, raised) == pytest.approx(expected + floor, rel=1e-9)


def test_weight_decay_is_constant_or_a_half_cosine_of_compute() -> None:
    assert {weight_decay_at(p, RECIPE) for p in (0, 0.3, 1)} == {0.05}
    rising = OptimConfig(weight_decay=0.04, weight_decay_end=0.4)
    assert weight_decay_at(0, rising) == pytest.approx(0.04)
    assert weight_decay_at(0.5, rising) == pytest.approx(0.22)
    assert weight_decay_at(1, rising) == pytest.approx(0.4)


def test_only_parameters_with_two_or_more_dimensions_are_decayed() -> None:
    with torch.device("meta"):
        model = MaskedAutoencoder("vit_tiny_patch16_224", decoder_depth=1)
    optimizer = build_optimizer(model, RECIPE)
    set_schedule(optimizer, 0.5, RECIPE)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert {"encoder.cls_token", "decoder.mask_token", "decoder.pred.weight"} <= decayed
    assert all(name.endswith("bias") or "norm" in name for name in plain)
    assert not any(name.endswith("bias") for name in decayed)
    assert "encoder.pos_embed" not in decayed | plain
    assert len(decayed | plain) == len(names) - 1


def test_a_group_may_scale_its_learning_rate() -> None:
    p = torch.nn.Parameter(torch.zeros(2, 2))
    groups = [{"params": [p], "decayed": True, "lr_scale": 0.25}]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_schedule(optimizer, 0.525, RECIPE)
    half = 0.5 * (1 + math.cos(math.pi * 0.5))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25 * RECIPE.lr * half)


@pytest.mark.parametrize("own", [0.0, 1e-4])
def test_any_optimizer_follows_the_schedules(own: float) -> None:
    """Its weight decay too, also through 0, unless its own is 0."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, weight_decay=own)
    rising = OptimConfig(weight_decay=0, weight_decay_end=0.4)
    for progress, decay in ((0, 0.0), (1, 0.4)):
        set_schedule(optimizer, progress, rising)
        (group,) = optimizer.param_groups
        assert group["lr"] == lr_at(progress, rising)
        assert group["weight_decay"] == (decay if own else 0)


def test_learning_rate_follows_the_predicted_share_of_the_masked_patches_on_request() -> None:
    """CrossMAE's release multiplies it by kept / masked ratio: 1/3 at 0.25 of 0.75."""
    with torch.device("meta"):
        model = MaskedAutoencoder("vit_tiny_patch16_224", decoder_depth=1, decoder_share=1 / 3)
    for requested, scale in ((False, 1.0), (True, 1 / 3)):
        config = OptimConfig(scale_lr_by_decoder_share=requested)
        optimizer = build_optimizer(model, config)
        set_schedule(optimizer, 0.05, config)
        assert peak_scale(optimizer) == scale
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(scale * config.lr)
    with pytest.raises(UserError, match=r"optim\.scale_lr_by_decoder_share .* pre-training"):
        ClassifierOptimConfig(scale_lr_by_decoder_share=True)


def test_decay_fraction_keeps_the_rate_constant_and_then_falls_linearly() -> None:
    """So that runs of other lengths share what lies before."""
    config = OptimConfig(decay_fraction=0.2, min_lr=1e-5)
    peak = config.lr
    assert lr_at(0.025, config) == pytest.approx(peak / 2)
    assert [lr_at(p, config) for p in (0.05, 0.3, 0.8)] == pytest.approx([peak] * 3)
    assert lr_at(0.9, config) == pytest.approx((peak + 1e-5) / 2)
    assert lr_at(1.0, config) == pytest.approx(1e-5)
    half = OptimConfig(warmup_fraction=0.1, decay_fraction=0.4)  # of a run half as long
    assert lr_at(0.5, half) == pytest.approx(lr_at(0.25, OptimConfig(decay_fraction=0.2)))
    with pytest.raises(UserError, match=r"optim\.decay_fraction must lie"):
        OptimConfig(warmup_fraction=0.5, decay_fraction=0.6)
