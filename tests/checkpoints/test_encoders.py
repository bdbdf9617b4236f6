"""Encoders of others, as files, folders and names of timm: their tokens equal timm's own."""

import json
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from randomised import images_for, randomised
from safetensors.torch import save_file
from timm.models import save_for_hf

from finetune import EvaluateConfig, ProbeConfig, knn, linear_probe
from finetune.config import NetworkConfig
from finetune.evaluation.trained_classifier import load_classifier
from finetune.probing.frozen_encoder import open_encoder
from finetune.probing.intermediate_layers import block_indices
from finetune.training.model import build_classifier
from mae_et import UserError, export, extract_features, load_encoder
from mae_et.checkpoints import formats
from mae_et.checkpoints.formats import load_weights
from mae_et.models.features import pool_tokens

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
# By file: what the tensors determine. Settings and the family that has them.
DETERMINED = {
    "supervised": {},
    "DINO": {"num_classes": 0},
    "LayerScale": {"init_values": 1e-5, "num_classes": 0},
    "DINOv2 registers": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
    "registers with positions": {"reg_tokens": 2},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "fine-tuned": {"global_pool": "avg"},
    "no QKV bias": {"qkv_bias": False},
    "narrow MLP": {"mlp_ratio": 3.0},
    "grey, 40 pixels": {"in_chans": 1, "img_size": 40},
}
# By name: what leaves no trace.
NAMED = {
    "CLIP": "vit_base_patch16_clip_224",
    "quick GELU": "vit_base_patch16_clip_quickgelu_224",
    "SwiGLU": "vit_giant_patch14_dinov2",
    "distilled": "deit_tiny_distilled_patch16_224",
    "SigLIP": "vit_base_patch32_siglip_256",  # sizes with other activations have the same names
}


def assert_same_features(found, expected) -> None:
    images = images_for(expected)
    with torch.no_grad():
        torch.testing.assert_close(
            found.forward_features(images), expected.forward_features(images), rtol=0, atol=1e-5
        )
        own = {"avg": "mean", "token": "cls"}[expected.global_pool]
        torch.testing.assert_close(
            extract_features(found, images, own),
            expected.forward_head(expected.forward_features(images), pre_logits=True),
            rtol=0,
            atol=1e-5,
        )


def write_timm_folder(folder: Path, network: torch.nn.Module, about: dict) -> None:
    (folder / "config.json").write_text(json.dumps(about))
    save_file(network.state_dict(), folder / "model.safetensors")


@pytest.mark.parametrize("settings", DETERMINED.values(), ids=DETERMINED)
def test_a_file_of_a_timm_vit_gives_its_features(settings: dict, tmp_path: Path) -> None:
    expected = randomised(
        timm.create_model("vit_tiny_patch16_224", **({"num_classes": 5} | SMALL | settings))
    )
    path = tmp_path / "weights.pth"
    torch.save({"epoch": 3, "state_dict": expected.state_dict()}, path)
    assert_same_features(load_encoder(path, encoder_num_heads=3), expected)


def test_blocks_that_a_file_leaves_open_are_reported(tmp_path: Path, capsys) -> None:
    network = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=5, final_norm=False)
    torch.save(network.state_dict() | {"head.0.weight": torch.zeros(2)}, tmp_path / "a.pth")
    load_encoder(tmp_path / "a.pth", encoder_num_heads=3)
    said = capsys.readouterr().err
    assert "a.pth records neither activation nor epsilon: GELU and 1e-06 are taken" in said
    assert "a.pth has no norm after the last block: none is applied" in said
    assert "tensors that are not read: 3 (head.weight, head.bias, head.0.weight)" in said


# What a state dict does not show, and timm's `config.json` records.
SAVED_BY_TIMM = {
    "norms after the layers": ("vit_base_patch16_rpn_224", {"global_pool": "avg"}),
    "16 heads": ("vit_base_patch16_gap_224", {}),
    "6 heads": ("vit_tiny_patch16_224", {"num_heads": 6, "in_chans": 1}),
    "quick GELU": ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", {}),
    "rotary positions": ("vit_small_patch16_dinov3", {"global_pool": "avg"}),
}


@pytest.mark.filterwarnings("ignore:Pretrained")
@pytest.mark.parametrize(("name", "settings"), SAVED_BY_TIMM.values(), ids=SAVED_BY_TIMM)
def test_a_folder_that_timm_saves_gives_its_features_and_classes(
    name: str, settings: dict, tmp_path: Path
) -> None:
    sizes = {"depth": 1, "embed_dim": 96, "img_size": 32, "num_classes": 2}
    expected = randomised(timm.create_model(name, **sizes, **settings))
    save_for_hf(expected, tmp_path, {"label_names": ["b", "a"]}, safe_serialization=True)
    images = images_for(expected)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert_same_features(load_encoder(path), expected)
        classifier = load_classifier(EvaluateConfig(path), None)
        assert (classifier.channels, classifier.classes) == (images.shape[1], ["b", "a"])
        assert classifier.image_size == open_encoder(path).image_size == tuple(images.shape[2:])
        with torch.no_grad():
            assert torch.equal(classifier.network.eval()(images), expected(images))


def test_a_grid_that_only_the_recorded_image_size_shows_is_read(tmp_path: Path, capsys) -> None:
    """2 x 4 patches and the class token have as many positions as 3 x 3 patches without it."""
    name, options = "vit_base_patch16_224", {"embed_dim": 96, "num_heads": 2, "depth": 1}
    expected = randomised(timm.create_model(name, img_size=(32, 64), **options, num_classes=0))
    saved = {"state_dict": expected.state_dict()}
    for args in (Namespace(input_size=[3, 32, 64]), Namespace(model_kwargs={"img_size": [32, 64]})):
        args.model_kwargs = options | getattr(args, "model_kwargs", {})
        torch.save(saved | {"arch": name, "args": args}, tmp_path / "last.pth")
        assert_same_features(load_encoder(tmp_path / "last.pth"), expected)
    assert "taken for" not in capsys.readouterr().err
    # Another trainer's entries, without a size.
    torch.save(saved | {"arch": "vit", "args": Namespace(input_size=64)}, tmp_path / "bare.pth")
    assert load_encoder(tmp_path / "bare.pth", 2).patch_embed.grid_size == (3, 3)
    assert "9 positions are taken for 3 x 3 patches, none for" in capsys.readouterr().err


def test_a_checkpoint_of_timm_s_training_names_its_blocks(tmp_path: Path) -> None:
    name, options = "vit_base_patch16_rpn_224", {"embed_dim": 96, "mlp_ratio": 3, "num_heads": 2}
    expected = randomised(timm.create_model(name, depth=1, img_size=32, **options))
    saved = {"arch": name, "args": Namespace(model_kwargs=options)}
    torch.save(saved | {"state_dict": expected.state_dict()}, tmp_path / "last.pth.tar")
    assert_same_features(load_encoder(tmp_path / "last.pth.tar"), expected)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [({"num_heads": 6}, "records 6"), ({"act_layer": "relu"}, "records act")],
)
def test_what_timm_records_is_not_ignored_when_fine_tuning(
    argument: dict, sentence: str, tmp_path: Path
) -> None:
    arguments = {"depth": 1, "norm_layer": None} | argument
    name = "vit_tiny_patch16_224"
    about = {"architecture": name, "model_args": arguments}
    write_timm_folder(tmp_path, timm.create_model(name, depth=1), about)
    with pytest.raises(UserError, match=sentence):
        build_classifier(NetworkConfig(tmp_path, name), 2)
    if "num_heads" in argument:
        assert load_weights(tmp_path).encoder_num_heads == 6
    else:
        with pytest.raises(UserError, match=sentence):
            load_weights(tmp_path)


@pytest.mark.parametrize("name", NAMED.values(), ids=NAMED)
def test_a_file_whose_weights_leave_the_network_open_needs_its_name(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    expected = randomised(timm.create_model(name, num_classes=5, depth=1, img_size=56))
    save_file(dict(expected.state_dict()), tmp_path / "weights.safetensors")
    reason = "SigLIP's attentive pooling, .*" if "siglip" in name else ""
    with pytest.raises(UserError, match=f"{reason}give its timm model with --architecture"):
        load_encoder(tmp_path / "weights.safetensors", encoder_num_heads=3)
    real = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **s: real(name, **(s | {"depth": 1, "img_size": 56}))
    )
    found = load_encoder(tmp_path / "weights.safetensors", architecture=name)
    images = images_for(expected)
    with torch.no_grad():
        torch.testing.assert_close(
            found.forward_features(images), expected.forward_features(images), rtol=0, atol=1e-5
        )
    with pytest.raises(UserError, match=r"(as|fit) vit_base_patch16_224: "):
        load_encoder(tmp_path / "weights.safetensors", architecture="vit_base_patch16_224")


def test_dinov2_s_own_layout_with_registers_is_that_of_timm(tmp_path: Path) -> None:
    """Its table has a position for the class token, its registers another name."""
    settings = SMALL | DETERMINED["DINOv2 registers"] | {"num_classes": 0}
    expected = randomised(timm.create_model("vit_tiny_patch16_224", **settings))
    tensors = dict(expected.state_dict())
    offset = torch.randn(1, 1, 48)
    tensors["pos_embed"] = torch.cat([offset, tensors["pos_embed"]], dim=1)
    tensors["cls_token"] = tensors["cls_token"] - offset
    tensors["register_tokens"] = tensors.pop("reg_token")
    tensors["mask_token"] = torch.zeros(1, 48)
    torch.save(tensors, tmp_path / "dinov2_reg4.pth")
    assert_same_features(load_encoder(tmp_path / "dinov2_reg4.pth", encoder_num_heads=3), expected)


def test_a_folder_of_transformers_that_wraps_a_timm_model_is_read(tmp_path: Path) -> None:
    import transformers

    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=SMALL | {"act_layer": "relu"}, num_labels=5
    )
    expected = randomised(transformers.TimmWrapperForImageClassification(config))
    expected.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert_same_features(load_encoder(path), expected.timm_model)
        assert load_classifier(EvaluateConfig(path), None).classes is None  # LABEL_0, ... are none


def test_what_differs_in_more_than_sizes_is_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.ViTConfig(**sizes, hidden_act="relu")
    transformers.ViTModel(config).save_pretrained(tmp_path)
    for read in (load_encoder, load_weights):  # fine-tuning reads the same folders
        with pytest.raises(UserError, match="has the activation relu: give its timm model"):
            read(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"use_swiglu_ffn": True}))
    with pytest.raises(UserError, match="has another MLP than a plain ViT"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(about | {"hidden_act": ["mish"]}))
    with pytest.raises(UserError, match=r"has the activation .*mish.*, not gelu or "):
        load_encoder(tmp_path, architecture="vit_tiny_patch16_224")
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match="a hierarchical network, no plain vision transformer"):
        load_encoder(tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match="returns no list of tokens"):
        load_encoder(tmp_path / "resnet.safetensors", architecture="resnet10t")


def test_a_timm_name_is_fetched_and_gives_its_own_features(monkeypatch) -> None:
    settings = SMALL | {"reg_tokens": 4, "num_classes": 0, "act_layer": torch.nn.ReLU}
    expected = randomised(timm.create_model("vit_tiny_patch16_224", **settings))
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *given, pretrained=False, **settings: (
            expected if pretrained else create(*given, **settings)
        ),
    )  # fmt: skip
    assert_same_features(load_encoder("vit_small_patch14_reg4_dinov2"), expected)
    assert load_weights(Path("vit_small_patch14_reg4_dinov2")).encoder_num_heads == 3
    for architecture in (None, "vit_tiny_patch16_224"):
        with pytest.raises(UserError, match="there is no checkpoint nowhere"):
            load_encoder("nowhere", architecture=architecture)

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"cannot fetch deit_tiny_patch16_224 .*: no route to host"):
        load_encoder("deit_tiny_patch16_224")


def test_a_timm_name_keeps_its_blocks(monkeypatch) -> None:
    name = "vit_base_patch16_rpn_224"
    monkeypatch.setattr(
        formats, "fetch_from_hub", lambda *_, **__: timm.create_model(name, depth=1)
    )
    assert load_weights(Path(name)).architecture == name


def test_a_timm_folder_may_have_its_weights_in_shards(tmp_path: Path) -> None:
    expected = randomised(timm.create_model("test_vit", num_classes=0))
    index = tmp_path / "model.safetensors.index.json"
    save_file(expected.state_dict(), tmp_path / "1.safetensors")
    placed = dict.fromkeys(expected.state_dict(), "1.safetensors")
    index.write_text(json.dumps({"weight_map": placed}))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    assert_same_features(load_encoder(tmp_path), expected)
    for path in (tmp_path, index):
        assert load_weights(path).encoder.keys() == expected.state_dict().keys()


@pytest.mark.parametrize(
    "entry",
    [{"architecture": 1}]
    + [{"model_args": given} for given in ({"num_heads": []}, {"block_fn": "x"}, {"pruned": True})],
)
def test_damaged_entries_of_timm_s_config_end_in_one_sentence(entry: dict, tmp_path: Path) -> None:
    about = {"architecture": "test_vit", "pretrained_cfg": {}} | entry
    write_timm_folder(tmp_path, timm.create_model("test_vit"), about)
    with pytest.raises(UserError) as refused:
        load_encoder(tmp_path)
    assert "takes no" not in str(refused.value)  # which is of arguments that timm does not know
    with suppress(UserError):  # tensors alone determine this network
        build_classifier(NetworkConfig(tmp_path, "test_vit", image_size=160), 2)


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "vit_tiny_r_s16_p8_224"])
def test_encoders_with_a_stem_take_images_of_its_channels(name: str, tmp_path: Path) -> None:
    expected = randomised(timm.create_model(name, num_classes=0))
    torch.save(expected.state_dict(), tmp_path / "a.pth")
    encoder = open_encoder(tmp_path / "a.pth", architecture=name)
    images = torch.randn(1, encoder.channels, *encoder.image_size)
    with torch.no_grad():
        assert torch.equal(encoder.encode(images), expected.forward_features(images))
    assert encoder.channels == 3
    assert encoder.patch > 1
    assert (224 // encoder.patch) ** 2 == encoder.network.patch_embed.num_patches
    if name.startswith("xcit"):
        with pytest.raises(UserError, match="timm cannot initialise a Xcit again"):
            encoder.initialise()
    with pytest.raises(UserError, match=r"image_size(: timm cannot resize this Xcit| 120 is not)"):
        encoder.at_size(120 if "r_s16" in name else 240)  # patches of 8 features, or 32 pixels


def test_networks_of_maps_or_without_blocks_are_refused() -> None:
    network = torch.nn.Identity()
    with pytest.raises(UserError, match="Identity are maps"):
        pool_tokens(network, torch.zeros(2, 4, 4, 8), "mean")
    with pytest.raises(UserError, match="layers: a Identity has no list of blocks"):
        block_indices(Namespace(network=network), [1])


def test_pooling_by_a_class_token_needs_one() -> None:
    network = timm.create_model("vit_tiny_patch16_224", **(SMALL | DETERMINED["no class token"]))
    assert extract_features(network.eval(), images_for(network)).shape == (2, 48)
    with pytest.raises(UserError, match="needs a class token"):
        extract_features(network, images_for(network), "cls")


def test_the_encoder_of_a_run_is_fine_tuned_whole_as_that_of_a_file(finished: Path) -> None:
    assert all(each.requires_grad for each in load_encoder(finished).parameters())


def test_probes_score_other_encoders_and_our_own_export_alike(
    finished: Path, tmp_path: Path, tiny
) -> None:
    """A run, its export to timm's layout (without what a run records) and a foreign ViT."""
    exported = export(finished, "timm", tmp_path / "timm.safetensors")
    heads = open_encoder(finished).network.blocks[0].attn.num_heads
    shared = {"num_workers": 0, "device": "cpu", "data": tiny().data}
    own, same = (
        knn(ProbeConfig(path, encoder_num_heads=heads, **shared)) for path in (finished, exported)
    )
    assert own["provenance"].pop("checkpoint") == str(finished.resolve())
    assert same["provenance"].pop("checkpoint") == str(exported)
    assert own == same
    settings = SMALL | DETERMINED["DINOv2 registers"] | {"num_classes": 0}
    other = randomised(timm.create_model("vit_tiny_patch16_224", **settings))
    save_file(dict(other.state_dict()), tmp_path / "dinov2.safetensors")
    config = ProbeConfig(
        tmp_path / "dinov2.safetensors", encoder_num_heads=3, untrained=True, epochs=2, **shared
    )
    assert {"knn", "untrained_knn"} <= set(knn(config))
    assert {"linear", "untrained_linear"} <= set(linear_probe(config))
    damaged = dict(other.state_dict()) | {"norm.bias": torch.full((48,), torch.inf)}
    save_file(damaged, tmp_path / "inf.safetensors")
    with pytest.raises(UserError, match="weights that are not finite"):
        knn(ProbeConfig(tmp_path / "inf.safetensors", encoder_num_heads=3, **shared))
