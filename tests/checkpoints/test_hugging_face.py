"""Folders of transformers, as its own writer leaves them: ViTMAE whole, in shards, bare; ViTs."""

import json
from pathlib import Path

import pytest
import torch
from classifiers import vit_of
from randomised import images_for, randomised
from safetensors.torch import load_file, save_file
from tiny_run import GOLDEN

from finetune.config import NetworkConfig
from finetune.training.model import build_classifier
from mae_et import UserError, export, load_encoder, load_pretrained
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.layouts.hugging_face_config import MODEL_TYPES
from mae_et.checkpoints.weights import Weights

TINY = GOLDEN / "mae_tiny_released_format.pth"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Return the golden model as a folder of Hugging Face's."""
    return export(
        TINY, "hf", tmp_path_factory.mktemp("hf"), encoder_num_heads=3, decoder_num_heads=4
    )


@pytest.fixture(scope="module")
def sharded(exported: Path, tmp_path_factory) -> Path:
    """Return the same, as transformers writes it in shards."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.ViTMAEForPreTraining.from_pretrained(exported)
    folder = tmp_path_factory.mktemp("shards")
    model.save_pretrained(folder, max_shard_size="100KB")
    assert not (folder / "model.safetensors").exists()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def copied(folder: Path, to: Path) -> Path:
    """Copy a folder's files by links, as the hub's cache keeps them."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).symlink_to(path)
    return to


def equal(found: Weights, expected: Weights) -> None:
    for ours, theirs in ((found.encoder, expected.encoder), (found.decoder, expected.decoder)):
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", "3"), ("num_attention_heads", -3), ("layer_norm_eps", "x"),
     ("decoder_num_attention_heads", 2.0)],
)  # fmt: skip
def test_impossible_numbers_are_refused(exported: Path, tmp_path: Path, key, value) -> None:
    folder = copied(exported, tmp_path / "folder")
    about = json.loads((exported / "config.json").read_text()) | {key: value}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"config.json is damaged: {key} is {value!r}"):
        load_weights(folder)


def test_shards_that_transformers_wrote_are_read_as_one_file(
    exported: Path, sharded: Path, tmp_path: Path
) -> None:
    equal(load_weights(sharded), load_weights(exported))
    assert load_pretrained(sharded).decoder is not None
    with pytest.raises(UserError, match="is one of several files: give their folder"):
        load_weights(min(sharded.glob("model-*.safetensors")))
    equal(load_weights(copied(sharded, tmp_path / "linked")), load_weights(exported))


def test_pickled_shards_are_read_too(exported: Path, sharded: Path, tmp_path: Path) -> None:
    """Which older versions wrote, and transformers 5 no longer does."""
    about = json.loads((sharded / "model.safetensors.index.json").read_text())
    for file in set(about["weight_map"].values()):
        torch.save(load_file(sharded / file), tmp_path / f"{file}.bin")
    placed = {name: f"{file}.bin" for name, file in about["weight_map"].items()}
    index = json.dumps({"metadata": {}, "weight_map": placed})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    (tmp_path / "config.json").write_text((sharded / "config.json").read_text())
    equal(load_weights(tmp_path), load_weights(exported))


def test_an_index_that_leads_out_of_its_folder_or_promises_too_much_is_refused(
    sharded: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"vit.embeddings.cls_token": torch.zeros(1, 1, 48)}, outside)
    folder = copied(sharded, tmp_path / "run")
    index = folder / "model.safetensors.index.json"
    about = json.loads(index.read_text())
    index.unlink()
    placed = about["weight_map"]
    for content, sentence in (
        ({"weight_map": placed | {"x": "../outside.safetensors"}}, "outside of its folder"),
        ({"weight_map": placed | {"x": str(outside)}}, "outside of its folder"),
        ({"weight_map": placed | {"x": "a/../../outside.safetensors"}}, "outside of its folder"),
        ({"weight_map": placed | {"x": "model-9.safetensors"}}, "'model-9.safetensors', which is"),
        ({"weight_map": placed | {"x": placed["vit.layernorm.bias"]}}, "lack x$"),
        ({"weight_map": placed | dict.fromkeys("abcdefg", "config.json")}, "cannot be read"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"metadata": {}}, "has no weight_map"),
        ([], "contains a list"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(UserError, match=sentence) as caught:
            load_weights(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shards", [False, True])
def test_an_encoder_saved_without_its_decoder_has_the_same_features(
    exported: Path, tmp_path: Path, shards: bool
) -> None:
    """Of a `ViTMAEModel`, whose names have no prefix, on unmasked images."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    settings = {"mask_ratio": 0.0, "layer_norm_eps": 0.1}
    theirs = transformers.ViTMAEModel.from_pretrained(exported, **settings).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if shards else "5GB")
    assert (tmp_path / "model.safetensors").exists() != shards
    model = load_pretrained(tmp_path)
    assert model.decoder is None
    images = torch.randn(2, 3, 64, 64)
    in_order = torch.arange(64.0).expand(2, -1)
    with torch.no_grad():
        expected = theirs(images, noise=in_order).last_hidden_state
        torch.testing.assert_close(model.encode(images), expected, rtol=1e-4, atol=1e-5)
        network = vit_of(load_weights(tmp_path), 5, 64, pool="cls").eval()
        torch.testing.assert_close(network.forward_features(images), expected, rtol=1e-4, atol=1e-5)
    timm_file = load_file(export(tmp_path, "timm", tmp_path / "encoder.safetensors"))
    assert set(timm_file) == set(load_weights(exported).encoder)
    again = export(tmp_path, "hf", tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["architectures"] == ["ViTModel"]


def test_default_epsilons_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for kind, eps in MODEL_TYPES.items():
        assert transformers.CONFIG_MAPPING[kind]().layer_norm_eps == eps


def test_other_folders_are_refused(tmp_path: Path, exported: Path) -> None:
    for number, (about, sentence) in enumerate(
        [([], "contains a list"), ({"model_type": "bert"}, "'bert' model"),
         ({"model_type": "vit_mae"}, "has neither")]
    ):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match=sentence):
            load_weights(folder)
    weights = load_file(exported / "model.safetensors")
    position, key = (
        "vit.embeddings.position_embeddings",
        "vit.encoder.layer.1.attention.attention.key",
    )
    for change, sentence in (
        ({"vit.strange": torch.zeros(1)}, r"unknown name: vit\.strange$"),
        ({"strange.weight": torch.zeros(1)}, r"unknown name: strange\.weight$"),
        ({position: None}, rf"lacks {position}$"),
        ({f"{key}.bias": None}, r"weights lack blocks\.1\.attn\.key\.bias$"),
        ({position: weights[position] * torch.nan}, r"not finite numbers \(pos_embed\)$"),
    ):
        changed = {name: t for name, t in (weights | change).items() if t is not None}
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(UserError, match=sentence):
            load_weights(folder)


WIDE = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}  # vit_tiny's


def assert_tokens_equal(path: Path, expected: torch.nn.Module, atol: float, **given: str) -> int:
    """Compare tokens with those of transformers; return the number of prefix tokens."""
    found = load_encoder(path, **given)
    images = images_for(found)
    with torch.no_grad():
        theirs = expected(images).last_hidden_state
        torch.testing.assert_close(found.forward_features(images), theirs, rtol=0, atol=atol)
    return found.num_prefix_tokens


@pytest.mark.parametrize(
    ("name", "size", "prefix"),
    [("ViTModel", 32, 1), ("ViTModel", [16, 64], 1), ("ViTForImageClassification", 32, 1),
     ("ViTForMaskedImageModeling", 32, 1), ("ViTMSNModel", 32, 1), ("IJepaModel", 32, 0),
     ("Dinov2Model", 32, 1), ("Dinov2WithRegistersModel", 32, 5)],
)  # fmt: skip
def test_a_folder_gives_transformers_features(name: str, size, prefix: int, tmp_path: Path) -> None:
    import transformers

    kind = getattr(transformers, name)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 8}
    more = {} if name.startswith("Dino") else {"intermediate_size": 100}
    expected = randomised(kind(kind.config_class(**sizes, image_size=size, **more)))
    expected.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert assert_tokens_equal(path, getattr(expected, "vit", expected), 1e-5) == prefix


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "swish", "quick_gelu"])
def test_a_named_network_takes_activation_and_epsilon_of_the_folder(
    activation: str, tmp_path: Path
) -> None:
    import transformers

    config = transformers.ViTConfig(**WIDE, hidden_act=activation, layer_norm_eps=0.1)
    expected = randomised(transformers.ViTModel(config))
    expected.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert_tokens_equal(path, expected, 1e-4, architecture="vit_tiny_patch16_224")
        network = NetworkConfig(checkpoint=path, backbone="vit_tiny_patch16_224")
        with pytest.raises(UserError, match="records act_layer of its network, which only embed"):
            build_classifier(network, 2)


def test_a_backbone_with_another_epsilon_than_its_checkpoint_is_reported(
    tmp_path: Path, capsys
) -> None:
    import transformers

    transformers.ViTModel(transformers.ViTConfig(**WIDE)).save_pretrained(tmp_path)
    build_classifier(NetworkConfig(tmp_path, "vit_tiny_patch16_224"), 2)
    said = capsys.readouterr().err
    assert "layer norms of epsilon 1e-12, vit_tiny_patch16_224 of 1e-06" in said
