"""Classifiers around checkpoints, in every layout that the field releases."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from classifiers import vit_of
from safetensors.torch import load_file, save_file
from timm.models import vision_transformer
from tiny_run import GOLDEN
from torch import nn

from finetune import ClassifierConfig
from finetune.config import ClassifierOptimConfig, NetworkConfig, keys_without_effect
from finetune.training.model import build_classifier, load_run_network
from finetune.training.results import describe
from mae_et import UserError, load_config
from mae_et.checkpoints.formats import load_weights
from mae_et.config.data import DataConfig
from mae_et.io.seals import seal

TINY = GOLDEN / "mae_tiny_released_format.pth"


def network(path: Path = TINY, classes: int = 10, **settings) -> torch.nn.Module:
    config = {"image_size": 64, "encoder_num_heads": 3} | settings
    return build_classifier(NetworkConfig(checkpoint=path, **config), classes).eval()


def features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_features(images)


def test_the_class_token_classifier_has_the_golden_features() -> None:
    golden = load_file(GOLDEN / "mae_tiny_expected.safetensors")
    found = features(network(pool="cls"), golden["images"])
    torch.testing.assert_close(found, golden["features_unmasked"], rtol=1e-4, atol=1e-5)


def test_mean_pooling_has_a_new_norm_and_a_head_near_zero() -> None:
    model = network(pool="mean")
    names = {name for name, _ in model.named_parameters()}
    assert "fc_norm.weight" in names
    assert "norm.weight" not in names
    assert torch.equal(model.fc_norm.weight, torch.ones(48))
    assert 0 < model.head.weight.abs().max() < 2e-4


@pytest.mark.parametrize(("size", "exact"), [(64, True), (96, False), (32, False)])
def test_positions_are_resampled_as_timm_does(size: int, exact: bool) -> None:
    table = network(image_size=size).pos_embed
    original = load_weights(TINY).encoder["pos_embed"]
    expected = timm.layers.resample_abs_pos_embed(original, [size // 8] * 2, num_prefix_tokens=1)
    assert table.shape == (1, (size // 8) ** 2 + 1, 48)
    assert torch.equal(table.detach(), expected)
    assert (table.shape == original.shape) == exact
    assert network(image_size=size)(torch.randn(1, 3, size, size)).shape == (1, 10)


def test_a_linear_probe_trains_only_its_head_behind_a_batch_norm_without_affine() -> None:
    model = network(pool="cls", probe="linear")
    assert isinstance(model.head[0], torch.nn.BatchNorm1d)
    assert (model.head[0].affine, model.head[0].eps) == (False, 1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"head.1.weight", "head.1.bias"}
    assert 0.005 < model.head[1].weight.std() < 0.02


def test_an_attentive_probe_trains_only_its_pooling_and_head() -> None:
    model = network(probe="attentive")
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"attn_pool", "head"}
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_released_layouts_load_strictly(tmp_path: Path, size: str) -> None:
    """Every key and shape of the released files, cut to two blocks to fit a test's time."""
    released = json.loads((GOLDEN / "released_key_shapes.json").read_text())
    shapes, encoder = (released[f"pretrain_{family}_{size}"] for family in ("full", "encoder"))
    kept = {n: s for n, s in shapes.items() if "blocks." not in n or n.split(".")[1] in {"0", "1"}}
    tensors = {n: torch.zeros(s) for n, s in kept.items() if n != "decoder_pos_embed"}  # fixed
    torch.save({"model": tensors}, tmp_path / "mae.pth")
    weights = load_weights(tmp_path / "mae.pth")
    assert weights.decoder
    model = vit_of(weights, 1000, 224, pool="cls")
    expected = {n for n in kept if "decoder" not in n and n != "mask_token"}
    assert set(model.state_dict()) == expected | {"head.weight", "head.bias"}
    depth = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    assert len(depth) == {"base": 12, "large": 24, "huge": 32}[size]
    # The file of the encoder alone has the same tensors without the decoder's.
    assert encoder == {n: s for n, s in shapes.items() if n in encoder}
    assert {n for n in shapes if n not in encoder} == {
        n for n in shapes if "decoder" in n or n == "mask_token"
    }


def test_fine_tuned_and_linear_probe_files_keep_their_heads(tmp_path: Path, capsys) -> None:
    encoder = load_weights(TINY).encoder
    head = {"head.weight": torch.randn(10, 48), "head.bias": torch.randn(10)}
    tuned = {n: t for n, t in encoder.items() if not n.startswith("norm.")} | head
    tuned |= {"fc_norm.weight": torch.full((48,), 2.0), "fc_norm.bias": torch.zeros(48)}
    torch.save({"model": tuned}, tmp_path / "tuned.pth")
    model = network(tmp_path / "tuned.pth")
    assert torch.equal(model.head.weight, head["head.weight"])
    assert torch.equal(model.fc_norm.weight, torch.full((48,), 2.0))
    probed = encoder | {
        "head.0.running_mean": torch.randn(48), "head.0.running_var": torch.rand(48),
        "head.0.num_batches_tracked": torch.tensor(5), "head.1.weight": head["head.weight"],
        "head.1.bias": head["head.bias"],
    }  # fmt: skip
    torch.save({"model": probed}, tmp_path / "probed.pth")
    model = network(tmp_path / "probed.pth", pool="cls", probe="linear")
    assert torch.equal(model.head[0].running_mean, probed["head.0.running_mean"])
    assert torch.equal(model.head[1].bias, head["head.bias"])
    assert "the head of" in capsys.readouterr().err
    for settings in ({"classes": 7}, {"pool": "cls"}):  # a head of other classes or another feature
        other = network(tmp_path / "probed.pth", **settings)
        assert other.head.weight.abs().max() < 2e-4
    wide = encoder | head | {"head.weight": torch.ones(10, 96)}  # as DINOv2's of transformers
    torch.save({"model": wide}, tmp_path / "wide.pth")
    assert network(tmp_path / "wide.pth", pool="cls").head.weight.shape == (10, 48)
    assert "the head of" not in capsys.readouterr().err


def test_a_run_keeps_the_epsilon_of_its_start(tmp_path: Path) -> None:
    start = network().state_dict()
    about = {"classes": list("abcdefghij"), "encoder_num_heads": 3, "norm_eps": 0.1}
    (tmp_path / "classes.json").write_text(json.dumps(seal(about)))
    weights = replace(load_weights(TINY), norm_eps=0.1).with_given(3)
    again = load_run_network(NetworkConfig(TINY, image_size=64), tmp_path, start)
    for model in (vit_of(weights, 10, 64), again):
        assert {part.eps for part in model.modules() if isinstance(part, nn.LayerNorm)} == {0.1}


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    encoder = load_weights(TINY).encoder
    without = {n: t for n, t in encoder.items() if n != "blocks.1.mlp.fc1.bias"}
    torch.save({"model": without}, tmp_path / "without.pth")
    torch.save({"model": encoder | {"rope": torch.zeros(1)}}, tmp_path / "more.pth")
    wrong = encoder | {"blocks.1.mlp.fc1.bias": torch.zeros(5)}
    torch.save({"model": wrong}, tmp_path / "wrong.pth")
    several = {n: t for n, t in wrong.items() if not n.startswith("blocks.0.attn")}
    several |= {f"rope.{i}": torch.zeros(1) for i in range(7)} | {"blocks.0.attn.x": torch.zeros(1)}
    torch.save({"model": several}, tmp_path / "several.pth")
    for name, sentence in {
        "without.pth": "1 missing (blocks.1.mlp.fc1.bias)",
        "more.pth": "1 unexpected (rope)",
        "wrong.pth": "1 misshapen (blocks.1.mlp.fc1.bias is [5], not [192])",
        "several.pth": "4 missing (blocks.0.attn.qkv.weight, blocks.0.attn.qkv.bias, "
        "blocks.0.attn.proj.weight, blocks.0.attn.proj.bias); "
        "8 unexpected (rope.0, rope.1, rope.2, rope.3, rope.4, ...); "
        "1 misshapen (blocks.1.mlp.fc1.bias is [5], not [192])",
    }.items():
        with pytest.raises(UserError) as caught:
            network(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name} does not fit: {sentence}"
    with pytest.raises(UserError, match="image_size 60 is not a multiple of the patch size 8"):
        network(image_size=60)
    del encoder["cls_token"]  # as of I-JEPA
    torch.save(encoder, tmp_path / "jepa.pth")
    with pytest.raises(UserError, match="no class token: fine-tune its timm model with"):
        network(tmp_path / "jepa.pth")


def test_keys_without_effect_are_named_and_stay_readable() -> None:
    """Runs with such keys exist, so a config that has them is valid."""
    model = NetworkConfig(backbone="a", pool="cls", checkpoint_key="teacher")
    config = ClassifierConfig(model=model, optim=ClassifierOptimConfig(optimizer="lars"))
    assert keys_without_effect(config) == ["model.pool", "model.checkpoint_key"]
    optim = ClassifierOptimConfig(optimizer="lars", betas=(0.9, 0.95))
    config = ClassifierConfig(model=NetworkConfig(checkpoint=Path("a"), pool="cls"), optim=optim)
    assert keys_without_effect(config) == ["optim.betas"]


def test_fine_tuning_without_a_recipe_is_told_from_published_ones_and_probes() -> None:
    plain = ClassifierConfig(model=NetworkConfig(checkpoint=Path("a")))
    assert plain.lacks_recipe
    probe = ClassifierConfig(model=NetworkConfig(checkpoint=Path("a"), probe="linear"))
    scratch = ClassifierConfig(model=NetworkConfig(backbone="a"))
    published = load_config(ClassifierConfig, ["finetune/vit_b16"], ["--model.checkpoint=a"])
    assert not any(config.lacks_recipe for config in (probe, scratch, published))


def test_unknown_backbones_and_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot build model\.backbone 'resnet_none'"):
        build_classifier(NetworkConfig(backbone="resnet_none"), 5)
    for settings, sentence in (
        ({}, r"give --checkpoint \(model.checkpoint\) or model.backbone"),
        ({"backbone": "a", "probe": "linear"}, "cannot be combined with model.backbone"),
        ({"backbone": "a", "drop_path": 1.0}, "drop_path"),
    ):
        with pytest.raises(UserError, match=sentence):
            NetworkConfig(**settings)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no plain vision transformer"):
        network(tmp_path / "x.safetensors")


def test_what_tensors_determine_is_fine_tuned_as_timm_has_it(tmp_path: Path) -> None:
    """LayerScale, narrow MLPs and no biases of attention, as when an encoder is loaded."""
    settings = {"init_values": 0.5, "mlp_ratio": 2.0, "qkv_bias": False, "global_pool": "avg"}
    expected = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7, **settings
    ).eval()
    torch.save(expected.state_dict(), tmp_path / "scaled.pth")
    model = vit_of(load_weights(tmp_path / "scaled.pth").with_given(3), 7, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), expected(images))


def test_another_patch_size_and_rectangles_are_resampled_as_timm_does() -> None:
    weights = load_weights(TINY)
    model = vit_of(weights.with_given(3), 10, (96, 128), patch_size=16)
    kernel = timm.layers.resample_patch_embed(weights.encoder["patch_embed.proj.weight"], [16, 16])
    assert torch.equal(model.patch_embed.proj.weight.detach(), kernel)
    assert model.pos_embed.shape == (1, 6 * 8 + 1, 48)
    assert model(torch.randn(1, 3, 96, 128)).shape == (1, 10)


@pytest.mark.parametrize(
    "block", ["", "ParallelScalingBlock", "ParallelThingsBlock", "ResPostBlock"]
)
def test_epsilon_and_heads_are_recorded_whatever_the_blocks(block: str) -> None:
    network = timm.create_model(
        "vit_tiny_patch16_224",
        depth=1,
        norm_layer=partial(nn.LayerNorm, eps=0.25),
        **({"block_fn": getattr(vision_transformer, block)} if block else {}),
    )
    network.default_cfg["architecture"] = "vit_tiny_patch16_224"
    config = SimpleNamespace(data=DataConfig(), model=NetworkConfig(backbone="resnet10t"))
    run = SimpleNamespace(config=config, state=SimpleNamespace(model=network))
    about = json.loads(describe(run, ["a", "b"]))
    assert (about["norm_eps"], about["encoder_num_heads"]) == (0.25, 3)
