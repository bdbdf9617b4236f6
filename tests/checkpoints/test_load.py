import argparse
from pathlib import Path, PosixPath

import pytest
import timm
import torch
from flipped import flipped
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file
from tiny_run import GOLDEN
from torch import nn

from mae_et import ModelConfig, UserError, load_pretrained
from mae_et.checkpoints.checksums import sealed_safetensors
from mae_et.checkpoints.layouts.mae import split_mae
from mae_et.checkpoints.load import num_heads_of
from mae_et.checkpoints.weight_files import read_weight_file
from mae_et.checkpoints.weights import Weights
from mae_et.config.commands import ReconstructConfig
from mae_et.reconstruction import reconstruct
from mae_et.runtime.console import notify


def released() -> dict[str, torch.Tensor]:
    return read_weight_file(GOLDEN / "mae_tiny_released_format.pth")["model"]


def test_heads_that_the_weights_do_not_determine_must_be_given() -> None:
    with pytest.raises(UserError, match=r"width 48: give encoder_num_heads$"):
        load_pretrained(GOLDEN / "mae_tiny_released_format.pth")
    with pytest.raises(UserError, match=r"give decoder_num_heads$"):
        load_pretrained(GOLDEN / "mae_tiny_released_format.pth", encoder_num_heads=3)


def test_a_classifier_is_refused_before_images_are_asked_for(tmp_path: Path) -> None:
    network = timm.create_model("vit_base_patch16_224", num_classes=4, img_size=32, patch_size=8,
                                embed_dim=48, depth=1, num_heads=3)  # fmt: skip
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    config = ReconstructConfig(tmp_path / "vit.pth", encoder_num_heads=3)
    with pytest.raises(UserError, match="holds a classifier"):
        reconstruct(config)


def test_an_encoder_alone_loads_and_refuses_to_reconstruct(tmp_path: Path) -> None:
    weights = {
        name: w for name, w in released().items() if "decoder" not in name and name != "mask_token"
    }
    save_file(weights, tmp_path / "encoder.safetensors")
    torch.save({"model": weights}, tmp_path / "encoder.pth")
    whole = load_pretrained(GOLDEN / "mae_tiny_released_format.pth", 3, 4)
    images = torch.randn(1, 3, 64, 64)
    for name in ("encoder.safetensors", "encoder.pth"):
        model = load_pretrained(tmp_path / name, encoder_num_heads=3)
        assert model.decoder is None
        assert torch.equal(model.encode(images), whole.encode(images))
        with pytest.raises(RuntimeError, match="no decoder"):
            model(images)


def test_arguments_pickled_with_a_path_are_allowed(tmp_path: Path) -> None:
    arguments = argparse.Namespace(output_dir=PosixPath("/somewhere"), lr=0.1)
    torch.save({"model": released(), "args": arguments, "epoch": 3}, tmp_path / "checkpoint-3.pth")
    assert load_pretrained(tmp_path / "checkpoint-3.pth", 3, 4).decoder is not None


@pytest.mark.parametrize(("norm_pix", "target"), [(True, "norm_pix"), (False, "pixel")])
def test_target_of_mae_s_training_arguments_is_read(
    norm_pix: bool, target: str, tmp_path: Path, capsys
) -> None:
    arguments = argparse.Namespace(norm_pix_loss=norm_pix)
    torch.save({"model": released(), "args": arguments}, tmp_path / "a.pth")
    assert load_pretrained(tmp_path / "a.pth", 3, 4).target == target
    assert "target" not in capsys.readouterr().err
    torch.save({"model": released()}, tmp_path / "b.pth")
    assert load_pretrained(tmp_path / "b.pth", 3, 4).target == "norm_pix"
    assert "no target of its decoder: norm_pix is taken" in capsys.readouterr().err


def test_decoder_with_learned_positions_is_not_read(tmp_path: Path, capsys) -> None:
    changed = {"decoder_pos_embed": torch.ones_like(released()["decoder_pos_embed"])}
    torch.save(released() | changed, tmp_path / "a.pth")
    assert load_pretrained(tmp_path / "a.pth", 3, 4).decoder is None
    assert "a.pth: its decoder is not read: its positions are not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("head", "is_read"),
    [
        (nn.Linear(4, 2), True),
        (nn.Sequential(nn.Dropout(), nn.Linear(4, 2)), True),
        (nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)), True),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), False),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), False),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), False),
        (nn.Sequential(nn.LayerNorm(4), nn.Dropout(), nn.Linear(4, 2)), False),
    ],
    ids=str,
)
def test_heads_of_several_layers_are_not_read_as_one(head: nn.Module, is_read: bool) -> None:
    found = split_mae({f"head.{name}": tensor for name, tensor in head.state_dict().items()})[2]
    assert ({"weight", "bias"} <= found.keys()) == is_read == bool(found)


def test_unusable_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not weights")
    content = (GOLDEN / "mae_tiny_released_format.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(content[:50_000])
    (tmp_path / "nothing.pth").touch()
    (tmp_path / "table.json").write_text('{"a":  {"b": 1}}')
    torch.save(released(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "legacy.pth").read_bytes()
    (tmp_path / "short_pickle.pth").write_bytes(content[:5_000])
    content = safetensors_bytes(released())
    (tmp_path / "short.safetensors").write_bytes(content[:-1])
    (tmp_path / "header.safetensors").write_bytes(content[:100])
    sealed = sealed_safetensors(released(), {})
    assert int.from_bytes(sealed[:8], "little") % 8 == 0  # where tensors begin: aligned
    (tmp_path / "flipped.safetensors").write_bytes(flipped(sealed, -1))
    (tmp_path / "bits.safetensors").write_bytes(content.replace(b'"F32"', b'"F99"', 1))
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    learned = released()
    learned["pos_embed"] = torch.randn_like(learned["pos_embed"])
    torch.save({"model": learned}, tmp_path / "learned.pth")
    extra = {name: w for name, w in released().items() if not name.startswith("decoder")}
    extra["head.weight"] = torch.zeros(10, 48)
    torch.save({"model": extra}, tmp_path / "extra.pth")
    flat = released() | {"patch_embed.proj.weight": torch.zeros(48, 192)}
    torch.save({"model": flat}, tmp_path / "flat.pth")
    nowhere = {name: w for name, w in released().items() if name != "pos_embed"}
    torch.save({"model": nowhere}, tmp_path / "nowhere.pth")
    unjoined = {name: w for name, w in released().items() if name != "decoder_embed.weight"}
    torch.save({"model": unjoined}, tmp_path / "unjoined.pth")
    bent = released() | {"decoder_norm.bias": torch.zeros(3), "strange": torch.zeros(1)}
    del bent["blocks.1.norm1.bias"]
    torch.save({"model": bent}, tmp_path / "bent.pth")
    (tmp_path / "empty").mkdir()
    for name, sentence in {
        "missing.pth": "there is no checkpoint",
        "text.pth": "cannot be read: it is neither a safetensors file nor one of PyTorch$",
        "table.json": "cannot be read: it is neither a safetensors file nor one of PyTorch$",
        "nothing.pth": "cannot be read: it is empty$",
        "short.pth": "cannot be read: it is cut short$",
        "short_pickle.pth": r"cannot be read: it is (cut short$|damaged \()",  # PyTorch 2.7
        "short.safetensors": "cannot be read: it is cut short$",
        "header.safetensors": "cannot be read: it is cut short$",
        "flipped.safetensors": r"\.safetensors is damaged: it does not match its checksum$",
        "bits.safetensors": r"cannot be read: it is damaged \(\w+: ",
        "other.pth": "no plain vision transformer: there is no patch",
        "list.pth": "holds a list",
        "learned.pth": "positions other than",
        "extra.pth": "holds a classifier",
        "flat.pth": "no plain vision transformer",
        "nowhere.pth": "no plain vision transformer",
        "unjoined.pth": r"parts of a decoder, but no decoder_embed\.weight$",
        "bent.pth": r"does not fit: 1 missing \(encoder\.blocks\.1\.norm1\.bias\); 1 unexpected "
        r"\(encoder\.strange\); 1 misshapen \(decoder\.norm\.bias is \[3\], not \[32\]\)$",
        "empty": "no checkpoint that loads",
    }.items():
        with pytest.raises(UserError, match=sentence) as caught:
            load_pretrained(tmp_path / name, 3, 4)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="decoder_num_heads 5 does not divide the width 32"):
        load_pretrained(GOLDEN / "mae_tiny_released_format.pth", 3, 5)


def test_heads_that_are_only_published_are_reported(capsys) -> None:
    """MoCo v3's ViT-S has 12 heads where timm's and DINO's have 6."""
    notify.cache_clear()
    assert num_heads_of("encoder", 384, None) == 6
    line = "the weights do not record the encoder's heads: 6, as published for width 384"
    assert line in capsys.readouterr().err
    assert num_heads_of("encoder", 384, 12) == 12
    assert not capsys.readouterr().err


def test_other_heads_and_targets_than_those_recorded_are_refused() -> None:
    weights = Weights(Path("a"), {}, encoder_num_heads=6)
    assert weights.with_given(6).encoder_num_heads == weights.with_given().encoder_num_heads == 6
    with pytest.raises(UserError, match="encoder_num_heads 12: a records 6"):
        weights.with_given(12)
    model = ModelConfig(target="hog")
    with pytest.raises(UserError, match="target pixel: a records hog"):
        Weights(Path("a"), {}, model=model).with_given(target="pixel")
