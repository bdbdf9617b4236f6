"""Each exported layout opens in the other library with no conversion and gives the same numbers."""

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

from mae_et import UserError, export, load_pretrained
from mae_et.model import MaskedAutoencoder
from mae_et.weights import load_weights, read_file

HEADS = {"encoder_heads": 3, "decoder_heads": 4}
TINY = GOLDEN / "mae_tiny_released_format.pth"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "mae_tiny_expected.safetensors")


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_timm_loads_the_encoder_strictly_and_gives_the_golden_features(golden, tmp_path) -> None:
    path = export(TINY, "timm", tmp_path / "encoder.safetensors", **HEADS)
    encoder = timm.create_model(
        "vit_base_patch16_224", img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3,
        num_classes=0,
    )  # fmt: skip
    encoder.load_state_dict(load_file(path), strict=True)
    with torch.no_grad():
        same(encoder.eval().forward_features(golden["images"]), golden["features_unmasked"])


def test_the_mae_layout_has_the_released_file_s_names_and_tensors(tmp_path) -> None:
    ours = read_file(export(TINY, "mae", tmp_path / "out.pth", **HEADS))["model"]
    theirs = read_file(TINY)["model"]
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        atol = 1e-6 if "pos_embed" in name else 0  # positions are computed anew
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol)


def test_transformers_reconstructs_the_golden_predictions_from_the_same_noise(
    golden, tmp_path
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = export(TINY, "hf", tmp_path / "hf", **HEADS)
    model, info = transformers.ViTMAEForPreTraining.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        output = model.eval()(golden["images"], noise=golden["noise"])
    same(output.logits, golden["norm_pix.pred"])
    assert output.loss.item() == pytest.approx(golden["norm_pix.loss"].item(), rel=1e-5)


@pytest.mark.parametrize("saved_by_transformers", [False, True])
def test_mae_to_timm_to_hugging_face_and_back_keeps_every_tensor(
    tmp_path: Path, saved_by_transformers: bool
) -> None:
    """Through transformers' own writer too, which spells the decoder's blocks in another way."""
    folder = export(TINY, "hf", tmp_path / "hf", **HEADS)
    if saved_by_transformers:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        model = transformers.ViTMAEForPreTraining.from_pretrained(folder)
        model.save_pretrained(tmp_path / "again")
        folder = tmp_path / "again"
    back = read_file(export(folder, "mae", tmp_path / "back.pth"))["model"]
    encoder = load_file(export(folder, "timm", tmp_path / "encoder.safetensors"))
    first = read_file(export(TINY, "mae", tmp_path / "first.pth", **HEADS))["model"]
    assert set(back) == set(first)
    for name, tensor in first.items():
        assert torch.equal(back[name], tensor), name
    for name, tensor in encoder.items():
        assert torch.equal(tensor, first[name]), name


def test_what_a_hugging_face_folder_says_of_its_model_is_used(tmp_path: Path) -> None:
    folder = export(TINY, "hf", tmp_path / "hf", **HEADS)
    model = load_pretrained(folder)
    assert (model.encoder.blocks[0].attn.num_heads, model.target) == (3, "norm_pix")
    about = json.loads((folder / "config.json").read_text())
    assert about["layer_norm_eps"] == 1e-6
    (folder / "config.json").write_text(json.dumps(about | {"norm_pix_loss": False}))
    assert load_weights(folder).target == "pixel"


def test_what_a_layout_cannot_hold_is_refused_in_one_sentence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hog = MaskedAutoencoder(
        image_size=32, patch_size=8, encoder_width=768, encoder_depth=1, decoder_depth=1,
        target="hog",
    )  # fmt: skip
    save_file(dict(hog.encoder.state_dict()), tmp_path / "encoder.safetensors")
    for checkpoint, kind, sentence in (
        (tmp_path / "encoder.safetensors", "hf", "needs a decoder"),
        (tmp_path / "nowhere", "timm", "there is no checkpoint"),
        (TINY, "onnx", "format must be timm, hf or mae"),
    ):
        with pytest.raises(UserError, match=sentence):
            export(checkpoint, kind, tmp_path / "out", **HEADS)  # type: ignore[arg-type]


def test_other_hugging_face_folders_are_refused(tmp_path: Path) -> None:
    for number, (about, sentence) in enumerate(
        [({"model_type": "bert"}, "'bert' model"), ({"model_type": "vit_mae"}, "has neither")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match=sentence):
            load_weights(folder)
    save_file({"vit.strange": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"unknown name: vit\.strange"):
        load_weights(folder)
