"""Parameter groups and optimizers, against the published rules."""

import json

import pytest
import timm
import torch
from classifiers import vit_of
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from tiny_run import GOLDEN

from finetune.config import ClassifierOptimConfig
from finetune.training.param_groups import build_optimizer, parameter_groups
from mae_et.checkpoints.formats import load_weights
from mae_et.training.optim import set_schedule

TINY = GOLDEN / "mae_tiny_released_format.pth"


def test_layer_decay_gives_the_groups_of_mae_s_fine_tuning() -> None:
    golden = json.loads((GOLDEN / "layer_decay_vit_base_0.65.json").read_text())
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=1000, global_pool="avg")
    names = {id(p): name for name, p in model.named_parameters()}
    ours = {
        (round(g["lr_scale"], 12), g["weight_decay"]): sorted(names[id(p)] for p in g["params"])
        for g in parameter_groups(model, 0.05, 0.65)
    }
    theirs = {(round(g["lr_scale"], 12), g["weight_decay"]): sorted(g["params"]) for g in golden}
    assert ours == theirs


def test_without_layer_decay_all_layers_have_the_full_rate() -> None:
    model = vit_of(load_weights(TINY).with_given(3), 10, 64)
    groups = parameter_groups(model, 0.05, 1.0)
    assert [group.get("lr_scale", 1) for group in groups] == [1, 1]
    names = {id(p): name for name, p in model.named_parameters()}
    plain = {names[id(p)] for p in groups[1]["params"]}
    assert {"cls_token", "pos_embed", "head.bias", "fc_norm.weight"} <= plain
    assert not any(name.endswith("proj.weight") for name in plain)


@pytest.mark.parametrize(
    "name", ["beit_base_patch16_224", "resnet18", "tiny_vit_5m_224", "xcit_nano_12_p16_224"]
)
def test_groups_of_other_networks_are_timm_s(name: str) -> None:
    """Including patterns and bias tables that a network exempts from weight decay."""
    with torch.device("meta"):
        network = timm.create_model(name)
    names = {id(p): key for key, p in network.named_parameters()}
    kept = getattr(network, "no_weight_decay", set)()

    def groups(found: list[dict], *keys: str) -> dict:
        return {names[id(p)]: [g[k] for k in keys] for g in found for p in g["params"]}

    plain = param_groups_weight_decay(network, 0.05, no_weight_decay_list=kept)
    assert groups(parameter_groups(network, 0.05, 1.0), "weight_decay") == groups(
        plain, "weight_decay"
    )
    scaled = param_groups_layer_decay(network, 0.05, no_weight_decay_list=kept, layer_decay=0.5)
    ours, theirs = (
        groups(found, "weight_decay", "lr_scale")
        for found in (parameter_groups(network, 0.05, 0.5), scaled)
    )
    assert {key for key in ours if ours[key] != theirs[key]} <= {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("layer_decay", [0.65, 1.0])
def test_weight_decay_may_start_at_zero_and_rise(layer_decay: float) -> None:
    model = vit_of(load_weights(TINY).with_given(3), 10, 64)
    decayed = [g["decayed"] for g in parameter_groups(model, 0.05, layer_decay)]
    assert {True, False} == set(decayed)
    config = ClassifierOptimConfig(weight_decay=0, weight_decay_end=0.1, layer_decay=layer_decay)
    optimizer = build_optimizer(model, config)
    set_schedule(optimizer, 1.0, config)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1 * each for each in decayed]


def scales(network: torch.nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the learning rate scale of each parameter."""
    names = {id(p): name for name, p in network.named_parameters()}
    groups = parameter_groups(network, 0.05, layer_decay)
    found = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert set(found) == set(names.values())
    return found


@pytest.mark.parametrize(
    ("name", "pool"),
    [("vit_tiny_patch16_224", "token"), ("deit_tiny_patch16_224", "token"),
     ("vit_tiny_patch16_224", "avg")],
)  # fmt: skip
def test_the_final_norm_and_the_head_have_the_full_rate(name: str, pool: str) -> None:
    """MAE gives rate 1 to all that follows the blocks, and less to each block below."""
    found = scales(timm.create_model(name, num_classes=5, global_pool=pool), 0.5)
    after = [key for key in found if key.startswith(("norm.", "fc_norm.", "head."))]
    assert len(after) == 4
    assert {found[key] for key in after} == {1.0}
    assert found["blocks.11.mlp.fc1.weight"] == 0.5
    assert found["blocks.0.mlp.fc1.weight"] == 0.5**12
    assert found["cls_token"] == found["patch_embed.proj.weight"] == 0.5**13


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_optimizers_have_the_betas_and_the_clipping_of_the_config(name) -> None:
    config = ClassifierOptimConfig(optimizer=name, betas=(0.8, 0.85), clip_grad=0.5)
    for group in build_optimizer(torch.nn.Linear(4, 3), config).param_groups:
        assert group["betas"] == (0.8, 0.85)
        assert group.get("max_grad_norm", 0.5) == 0.5  # LAMB clips itself


def test_lars_adapts_matrices_and_not_biases_even_without_decay() -> None:
    """Against MAE's rule: step = lr * trust * |w| / |g| * g for products, lr * g for biases."""
    layer = torch.nn.Linear(4, 3)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    config = ClassifierOptimConfig(optimizer="lars", weight_decay=0.0, base_lr=0.1, min_lr=0.0)
    optimizer = build_optimizer(layer, config)
    for group in optimizer.param_groups:
        group["lr"] = 2.0
    layer(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    w, b = layer.weight, layer.bias
    rate = 0.001 * before["weight"].norm() / w.grad.norm()
    torch.testing.assert_close(w.detach(), before["weight"] - 2.0 * rate * w.grad)
    torch.testing.assert_close(b.detach(), before["bias"] - 2.0 * b.grad)
    optimizer.step()  # of the same gradient, with momentum
    torch.testing.assert_close(b.detach(), before["bias"] - 2.0 * (1 + 1.9) * b.grad)
