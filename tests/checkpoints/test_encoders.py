"""Encoders of others, as files, folders and names: tokens equal timm's and transformers' own."""

import json
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from randomised import randomised
from safetensors.torch import save_file
from timm.models import save_for_hf

from finetune import EvaluateConfig, ProbeConfig, knn, linear_probe
from finetune.config import NetworkConfig
from finetune.evaluation.trained_classifier import load_classifier
from finetune.probing.frozen_encoder import open_encoder
from finetune.training.model import build_classifier
from mae_et import UserError, export, extract_features, load_encoder
from mae_et.checkpoints import formats
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.layouts.timm_conversion import converted_by_timm
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
}


def images_for(network, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    channels = network.patch_embed.proj.in_channels
    return torch.randn(count, channels, *network.patch_embed.img_size, generator=generator)


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


@pytest.mark.parametrize("settings", DETERMINED.values(), ids=DETERMINED)
def test_a_file_of_a_timm_vit_gives_its_features(settings: dict, tmp_path: Path) -> None:
    expected = randomised(
        timm.create_model("vit_tiny_patch16_224", **({"num_classes": 5} | SMALL | settings))
    )
    path = tmp_path / "weights.pth"
    torch.save({"epoch": 3, "state_dict": expected.state_dict()}, path)
    assert_same_features(load_encoder(path, num_heads=3), expected)


def test_blocks_that_a_file_leaves_open_are_reported(tmp_path: Path, capsys) -> None:
    network = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=5, final_norm=False)
    torch.save(network.state_dict() | {"head.0.weight": torch.zeros(2)}, tmp_path / "a.pth")
    load_encoder(tmp_path / "a.pth", num_heads=3)
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
    about = {"architecture": "vit_tiny_patch16_224", "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(about))
    network = timm.create_model("vit_tiny_patch16_224", depth=1)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = NetworkConfig(backbone="vit_tiny_patch16_224", checkpoint=tmp_path)
    with pytest.raises(UserError, match=sentence):
        build_classifier(config, 2)
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
    with pytest.raises(UserError, match="give its timm model with --architecture"):
        load_encoder(tmp_path / "weights.safetensors", num_heads=3)
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
    assert_same_features(load_encoder(tmp_path / "dinov2_reg4.pth", num_heads=3), expected)


@pytest.mark.parametrize(
    "kind",
    ["ViT", "ViT of 16 x 64", "ViTForImageClassification", "SimMIM", "ViTMSN", "IJepa", "Dinov2",
     "registers"],
)  # fmt: skip
def test_a_hugging_face_folder_gives_transformers_features(kind: str, tmp_path: Path) -> None:
    import transformers

    sizes = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 8,
        "image_size": [16, 64] if "16 x 64" in kind else 32,
    }  # fmt: skip
    config, model = {
        "ViT": (transformers.ViTConfig, transformers.ViTModel),
        "ViTForImageClassification": (
            transformers.ViTConfig, transformers.ViTForImageClassification,
        ),
        "SimMIM": (transformers.ViTConfig, transformers.ViTForMaskedImageModeling),
        "ViTMSN": (transformers.ViTMSNConfig, transformers.ViTMSNModel),
        "IJepa": (transformers.IJepaConfig, transformers.IJepaModel),
        "Dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
        "registers": (
            transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel,
        ),
    }[kind.partition(" ")[0]]  # fmt: skip
    more = {"intermediate_size": 100} if kind.startswith("ViT") else {}
    expected = randomised(model(config(**sizes, **more)))
    expected.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = load_encoder(path)
        images = images_for(found)
        with torch.no_grad():
            theirs = getattr(expected, "vit", expected)(images).last_hidden_state
            torch.testing.assert_close(found.forward_features(images), theirs, rtol=0, atol=1e-5)
        assert found.num_prefix_tokens == {"registers": 5, "IJepa": 0}.get(kind, 1)


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


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "swish", "quick_gelu"])
def test_a_named_network_takes_activation_and_epsilon_of_a_folder_of_transformers(
    tmp_path: Path, activation: str
) -> None:
    import transformers

    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    config = transformers.ViTConfig(**sizes, hidden_act=activation, layer_norm_eps=0.1)
    expected = randomised(transformers.ViTModel(config))
    expected.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = load_encoder(path, architecture="vit_tiny_patch16_224")
        images = images_for(found)
        with torch.no_grad():
            theirs = expected(images).last_hidden_state
            torch.testing.assert_close(found.forward_features(images), theirs, rtol=0, atol=1e-4)
        network = NetworkConfig(checkpoint=path, backbone="vit_tiny_patch16_224")
        with pytest.raises(UserError, match="records act_layer of its network, which only embed"):
            build_classifier(network, 2)


def test_a_backbone_with_another_epsilon_than_its_checkpoint_is_reported(
    tmp_path: Path, capsys
) -> None:
    import transformers

    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path)
    build_classifier(NetworkConfig(tmp_path, "vit_tiny_patch16_224"), 2)
    said = capsys.readouterr().err
    assert "layer norms of epsilon 1e-12, vit_tiny_patch16_224 of 1e-06" in said


def test_what_differs_in_more_than_sizes_is_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
    transformers.ViTModel(transformers.ViTConfig(**sizes, hidden_act="relu")).save_pretrained(
        tmp_path
    )
    for read in (load_encoder, load_weights):  # fine-tuning reads the same folders
        with pytest.raises(UserError, match="has the activation relu: give its timm model"):
            read(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text()) | {"hidden_act": ["mish"]}
    (tmp_path / "config.json").write_text(json.dumps(about))
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
    with pytest.raises(UserError, match="there is no checkpoint nowhere"):
        load_encoder("nowhere")

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"cannot fetch deit_tiny_patch16_224 .*: no route to host"):
        load_encoder("deit_tiny_patch16_224")


def test_a_timm_name_keeps_its_blocks(monkeypatch) -> None:
    name = "vit_base_patch16_rpn_224"
    network = timm.create_model(name, depth=1)
    monkeypatch.setattr(formats, "fetch_from_hub", lambda *_, **__: network)
    assert load_weights(Path(name)).architecture == name


def test_a_timm_folder_may_have_its_weights_in_shards(tmp_path: Path) -> None:
    expected = randomised(timm.create_model("test_vit", num_classes=0))
    index = tmp_path / "model.safetensors.index.json"
    save_file(expected.state_dict(), tmp_path / "1.safetensors")
    index.write_text(
        json.dumps({"weight_map": dict.fromkeys(expected.state_dict(), "1.safetensors")})
    )
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    assert_same_features(load_encoder(tmp_path), expected)
    for path in (tmp_path, index):
        assert load_weights(path).encoder.keys() == expected.state_dict().keys()


@pytest.mark.parametrize(
    "entry",
    [
        {"architecture": 1},
        {"model_args": {"num_heads": []}},
        {"model_args": {"block_fn": "x"}},
        {"model_args": {"pruned": True}},
    ],
)
def test_damaged_entries_of_timm_s_config_end_in_one_sentence(entry: dict, tmp_path: Path) -> None:
    about = {"architecture": "test_vit", "pretrained_cfg": {}} | entry
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError) as refused:
        load_encoder(tmp_path)
    assert "takes no" not in str(refused.value)  # which is of arguments that timm does not know
    with suppress(UserError):  # tensors alone determine this network
        build_classifier(NetworkConfig(tmp_path, "test_vit", image_size=160), 2)


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


def test_siglip_needs_its_timm_name(tmp_path: Path) -> None:
    """SigLIP's activation differs between sizes whose tensors have the same names."""
    network = timm.create_model("vit_base_patch32_siglip_256", num_classes=0, depth=1)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"SigLIP's attentive pooling, .* --architecture"):
        load_encoder(tmp_path / "a.pth")


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
    with pytest.raises(UserError, match=r"image_size(: timm cannot resize this Xcit| 120 is not)"):
        encoder.at_size(120 if "r_s16" in name else 240)  # patches of 8 features, or 32 pixels


def test_features_that_are_maps_are_refused() -> None:
    with pytest.raises(UserError, match="Identity are maps"):
        pool_tokens(torch.nn.Identity(), torch.zeros(2, 4, 4, 8), "mean")


def test_pooling_by_a_class_token_needs_one() -> None:
    network = timm.create_model("vit_tiny_patch16_224", **(SMALL | DETERMINED["no class token"]))
    assert extract_features(network.eval(), images_for(network)).shape == (2, 48)
    with pytest.raises(UserError, match="needs a class token"):
        extract_features(network, images_for(network), "cls")


def test_probes_score_other_encoders_and_our_own_export_alike(
    finished: Path, tmp_path: Path, tiny
) -> None:
    """A run, its export to timm's layout (without what a run records) and a foreign ViT."""
    run = finished
    own = open_encoder(run).network
    export(run, "timm", tmp_path / "timm.safetensors")
    heads = own.blocks[0].attn.num_heads
    shared = {"num_workers": 0, "device": "cpu", "data": tiny().data}
    scores = [
        knn(ProbeConfig(path, encoder_num_heads=heads, **shared))
        for path in (run, tmp_path / "timm.safetensors")
    ]
    found = [each["provenance"].pop("checkpoint") for each in scores]
    assert found == [str(run.resolve()), str(tmp_path / "timm.safetensors")]
    assert scores[0] == scores[1]
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
