"""Weights that timm itself converts: to a network's names and sizes, losing none unsaid."""

from pathlib import Path

import pytest
import timm
import torch
from randomised import randomised

from finetune.config import NetworkConfig
from finetune.training.model import build_classifier
from mae_et import UserError, load_encoder
from mae_et.checkpoints.layouts.timm_conversion import converted_by_timm


@pytest.mark.parametrize("prefix", ["visual.", "", "model.visual."])
def test_clip_s_image_tower_is_read_alone_and_in_a_wrapper(
    prefix: str, tmp_path: Path, monkeypatch
) -> None:
    name = "vit_base_patch32_clip_quickgelu_224"
    expected = randomised(timm.create_model(name, num_classes=0, depth=1))
    theirs = {
        "cls_token": "class_embedding", "pos_embed": "positional_embedding", "norm.": "ln_post.",
        "norm_pre.": "ln_pre.", "patch_embed.proj.": "conv1.", "blocks.": "transformer.resblocks.",
        ".norm1.": ".ln_1.", ".norm2.": ".ln_2.", ".mlp.fc1.": ".mlp.c_fc.",
        ".mlp.fc2.": ".mlp.c_proj.", ".qkv.": ".in_proj_", ".attn.proj.": ".attn.out_proj.",
    }  # fmt: skip
    tensors = {}
    for own, tensor in expected.state_dict().items():
        renamed = own
        for ours, other in theirs.items():
            renamed = renamed.replace(ours, other)
        tensors[prefix + renamed] = tensor.flatten(0, -2) if tensor.ndim == 3 else tensor
    tensors[f"{prefix}class_embedding"] = tensors[f"{prefix}class_embedding"].flatten()
    found = converted_by_timm(tensors, expected)
    assert all(torch.equal(found[key], each) for key, each in expected.state_dict().items())
    if prefix:  # the text tower's mask has infinities
        monkeypatch.setattr("mae_et.checkpoints.encoders.create_vit", lambda *_, **__: expected)
        text = {prefix.replace("visual.", "attn_mask"): torch.full((2, 2), -torch.inf)}
        torch.save(tensors | text, tmp_path / "clip.pth")
        assert load_encoder(tmp_path / "clip.pth", architecture=name) is expected
        tensors[f"{prefix}ln_post.bias"][0] = torch.nan
        torch.save(tensors, tmp_path / "clip.pth")
        with pytest.raises(UserError, match=r"not finite numbers \(norm\.bias\)"):
            load_encoder(tmp_path / "clip.pth", architecture=name)


def dinov3_of_the_hub(bias: float) -> dict[str, torch.Tensor]:
    """Return weights under DINOv3's own names, for timm's network without biases of qkv."""
    with torch.device("meta"):
        ours = timm.create_model("vit_small_patch16_dinov3", num_classes=0).state_dict()
    own = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    theirs = {}
    for name, tensor in ours.items():
        renamed = next((name.replace(a, b) for a, b in own.items() if a in name), name)
        theirs[renamed] = torch.ones(1).expand(tensor.shape).clone()
        if name.endswith("qkv.weight"):
            theirs[renamed.replace("weight", "bias")] = torch.full((len(tensor),), bias)
    return theirs


def test_dinov3_loses_no_biases_and_stdout_stays_empty(tmp_path: Path, capsys) -> None:
    name = "vit_small_patch16_dinov3"
    torch.save(dinov3_of_the_hub(0), tmp_path / "a.pth")
    assert load_encoder(tmp_path / "a.pth", architecture=name).reg_token.shape == (1, 4, 384)
    assert not capsys.readouterr().out
    torch.save(dinov3_of_the_hub(0.1), tmp_path / "b.pth")
    network = NetworkConfig(tmp_path / "b.pth", name, image_size=32)
    for read in (lambda: load_encoder(tmp_path / "b.pth", architecture=name),
                 lambda: build_classifier(network, 2)):  # fmt: skip
        with pytest.raises(UserError, match=r"it has blocks.0.attn.qkv.bias, .*: is it .*_qkvb\?"):
            read()
    own = load_encoder(tmp_path / "b.pth", architecture=f"{name}_qkvb")
    assert own.blocks[0].attn.q_bias.eq(0.1).all()


def test_biases_that_timm_renames_are_not_refused_as_dropped() -> None:
    network = randomised(timm.create_model("vit_tiny_patch16_224", depth=1))
    theirs = {f"visual.trunk.{name}": each for name, each in network.state_dict().items()}
    assert converted_by_timm(theirs, network).keys() == network.state_dict().keys()


def test_tensors_that_timm_drops_are_reported(capsys) -> None:
    """The layer before the head of old files, and a text tower; not what timm resamples."""
    network = timm.create_model("vit_tiny_patch16_224", depth=1)
    theirs = network.state_dict() | {"pre_logits.fc.weight": torch.ones(2)}
    theirs["patch_embed.proj.weight"] = torch.ones(192, 3, 8, 8)
    converted_by_timm(theirs, network)
    said = capsys.readouterr().err
    assert "tensors that timm does not read: 1 (pre_logits.fc.weight)" in said
    network = timm.create_model("vit_base_patch32_clip_224", depth=1, embed_dim=64, num_heads=1)
    theirs = {
        "visual.class_embedding": torch.ones(64),
        "visual.conv1.weight": torch.ones(64, 3, 32, 32),
        "text.weight": torch.ones(2),
    }
    converted_by_timm(theirs, network)
    assert "timm does not read: 1 (text.weight)" in capsys.readouterr().err


def test_deit_iii_s_own_names_are_read(tmp_path: Path) -> None:
    name = "deit3_small_patch16_224"
    expected = timm.create_model(name, num_classes=0).state_dict()
    theirs = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
              for n, t in expected.items()}  # fmt: skip
    torch.save({"model": theirs}, tmp_path / "a.pth")
    found = load_encoder(tmp_path / "a.pth", architecture=name).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_resampling_by_timm_is_reported(tmp_path: Path, capsys) -> None:
    for patch in (16, 32):
        network = timm.create_model("vit_tiny_patch16_224", patch_size=patch, num_classes=0)
        torch.save(network.state_dict(), tmp_path / "a.pth")
        load_encoder(tmp_path / "a.pth", architecture="vit_tiny_patch16_224")
        said = capsys.readouterr().err
        expected = "timm resampled pos_embed, patch_embed.proj.weight of the weights to the size of"
        assert (expected in said) == (patch == 32)
