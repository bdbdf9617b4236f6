"""Vision transformers under other libraries' names: read exactly, or refused by what they are."""

import gzip
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from randomised import randomised
from safetensors.torch import save_file
from tiny_run import GOLDEN

from finetune.config import NetworkConfig
from finetune.evaluation.trained_classifier import load_classifier
from finetune.scoring_config import EvaluateConfig
from finetune.training.backbone import build_backbone
from mae_et import UserError, load_encoder, load_pretrained
from mae_et.checkpoints.layouts.other_names import renamed_to_timm
from mae_et.checkpoints.weight_files import read_weight_file

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
HEADS = {"encoder_num_heads": 3, "decoder_num_heads": 4}
MAE = read_weight_file(GOLDEN / "mae_tiny_released_format.pth")["model"]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit(**settings) -> torch.nn.Module:
    return randomised(
        timm.create_model("vit_tiny_patch16_224", **(SMALL | {"num_classes": 5} | settings))
    )


def mmpretrain(tensors: dict[str, torch.Tensor], part: str = "backbone.") -> dict:
    """Rename timm's tensors to those of mmpretrain's VisionTransformer and LinearClsHead."""
    block = {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1",
             "ls1.gamma": "attn.gamma1.weight", "ls2.gamma": "ffn.gamma2.weight"}  # fmt: skip
    whole = {"patch_embed.proj": "patch_embed.projection", "norm": "ln1", "fc_norm": "ln2"}
    renamed = {}
    for name, tensor in tensors.items():
        start, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        if start == "head":
            renamed[f"head.fc.{number}"] = tensor
            continue
        if start in {"blocks", "decoder_blocks"}:
            theirs = next(
                (rest.replace(a, b) for a, b in block.items() if rest.startswith(a)), rest
            )
            theirs = f"{'layers' if start == 'blocks' else start}.{number}.{theirs}"
        else:
            stem, _, leaf = name.rpartition(".")
            theirs = f"{whole.get(stem, stem)}.{leaf}" if stem else name
        renamed[part + theirs] = tensor
    return renamed


def mmpretrain_mae() -> dict:
    decoder = {name for name in MAE if name.startswith(("decoder_", "mask_token"))}
    neck = mmpretrain({name: MAE[name] for name in decoder}, "neck.")
    for leaf in ("weight", "bias"):
        neck[f"neck.ln1.{leaf}"] = neck.pop(f"neck.decoder_norm.{leaf}")
    return neck | mmpretrain({n: t for n, t in MAE.items() if n not in decoder})


def beside(encoder: str) -> dict:
    """Return a masked autoencoder whose decoder stands beside an encoder of this prefix."""
    return {
        ("decoder." if name.startswith(("decoder_", "mask_token")) else encoder) + name: tensor
        for name, tensor in MAE.items()
    }


@pytest.mark.parametrize("settings", [{}, {"global_pool": "avg"}, {"init_values": 1e-5}])
def test_a_classifier_of_mmpretrain_gives_timm_s_logits(settings: dict, tmp_path: Path) -> None:
    expected = vit(**settings)
    payload = {"meta": {"epoch": 3}, "state_dict": mmpretrain(expected.state_dict())}
    torch.save(payload, tmp_path / "a.pth")
    config = EvaluateConfig(tmp_path / "a.pth", encoder_num_heads=3)
    with torch.no_grad():
        found = load_classifier(config, None).network.eval()(IMAGES)
        torch.testing.assert_close(found, expected(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", [0, 5])
def test_a_vit_of_torchvision_gives_its_tokens_and_logits(classes: int, tmp_path: Path) -> None:
    theirs = randomised(
        torchvision.models.VisionTransformer(32, 8, 2, 3, 48, 192, num_classes=classes or 1)
    )
    tensors = {
        f"module.{n}": t for n, t in theirs.state_dict().items() if classes or "head" not in n
    }
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "a.pth")
    with torch.no_grad():
        prefix = theirs.class_token.expand(2, -1, -1)
        tokens = theirs.encoder(torch.cat([prefix, theirs._process_input(IMAGES)], 1))
        found = load_encoder(tmp_path / "a.pth", encoder_num_heads=3).forward_features(IMAGES)
        torch.testing.assert_close(found, tokens, rtol=0, atol=1e-5)
        if classes:
            config = EvaluateConfig(tmp_path / "a.pth", encoder_num_heads=3)
            found = load_classifier(config, None).network.eval()(IMAGES)
            torch.testing.assert_close(found, theirs(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "tensors"),
    [("mmpretrain", mmpretrain_mae()), ("solo-learn", beside("backbone.")),
     ("lightly", beside("backbone.vit.") | {"backbone.mask_token": torch.zeros(1, 1, 48),
                                            "backbone.vit.head.weight": torch.zeros(9, 48),
                                            "backbone.vit.head.bias": torch.zeros(9)}),
     ("in a Lightning module", {f"model.{n}": t for n, t in beside("encoder.").items()})],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_masked_autoencoders_keep_their_decoder(layout: str, tensors: dict, tmp_path: Path) -> None:
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "a.ckpt")
    found = load_pretrained(tmp_path / "a.ckpt", **HEADS).state_dict()
    expected = load_pretrained(GOLDEN / "mae_tiny_released_format.pth", **HEADS).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def contrastive(encoder: dict) -> dict[str, dict]:
    """Return one encoder in the layouts of DINOv2's, iBOT's and MoCo v3's training."""
    chunks = {n.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): t
              for n, t in encoder.items()}  # fmt: skip
    head = {"head.0.weight": torch.zeros(8, 48), "head.1.running_mean": torch.zeros(8),
            "head.3.weight": torch.zeros(4, 8)}  # fmt: skip
    return {
        "DINOv2": {f"backbone.{n}": t for n, t in chunks.items()}
        | {"backbone.mask_token": torch.zeros(1, 48), "dino_head.mlp.0.weight": torch.zeros(4, 48)},
        "iBOT": {f"backbone.{n}": t for n, t in encoder.items()}
        | {"backbone.masked_embed": torch.zeros(1, 48), "head.mlp.0.weight": torch.zeros(4, 48)},
        "MoCo v3": {f"module.base_encoder.{n}": t for n, t in (encoder | head).items()},
    }


@pytest.mark.parametrize("method", ["DINOv2", "iBOT", "MoCo v3"])
def test_encoders_lose_what_only_their_training_needs(method: str, tmp_path: Path) -> None:
    expected = vit(num_classes=0)
    torch.save({"teacher": contrastive(expected.state_dict())[method]}, tmp_path / "a.pth")
    with torch.no_grad():
        found = load_encoder(tmp_path / "a.pth", encoder_num_heads=3).forward_features(IMAGES)
        assert torch.equal(found, expected.forward_features(IMAGES))


@pytest.mark.parametrize("kind", ["safetensors", "bin", "index", "single"])
def test_folders_of_accelerate_are_read(kind: str, tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    size = "5GB" if kind == "single" else "100KB"
    tensors = {f"module.{name}": tensor for name, tensor in MAE.items()}
    save_torch_state_dict(tensors, tmp_path, max_shard_size=size, safe_serialization=kind != "bin")
    (tmp_path / "random_states_0.pkl").write_bytes(b"anything")
    path = tmp_path / "model.safetensors.index.json" if kind == "index" else tmp_path
    found = load_pretrained(path, **HEADS).state_dict()
    expected = load_pretrained(GOLDEN / "mae_tiny_released_format.pth", **HEADS).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


OTHERS = {
    "adapters, .*: merge": {"base_model.model.qkv.lora_A.default.weight": (4, 48)},
    "a BEiT or a Swin, .*--architecture": {"blocks.0.attn.relative_position_bias_table": (9, 3),
                                           "patch_embed.proj.weight": (48, 3, 8, 8)},
    "OpenMMLab's Swin, ": {"backbone.stages.0.blocks.0.attn.w_msa.qkv.weight": (9, 3)},
    "rotary positions, ": {"rope_embed.periods": (4,), "patch_embed.proj.weight": (48, 3, 8, 8)},
    "a CLIP, ": {"visual.class_embedding": (48,), "visual.positional_embedding": (5, 48)},
    "under transformers' names, .*: give the folder":
        {"vit.embeddings.patch_embeddings.projection.weight": (48, 3, 8, 8)},
    "of MONAI, ": {"patch_embedding.patch_embeddings.weight": (48, 3, 8, 8, 8)},
    "of vit-pytorch, ": {"to_patch_embedding.2.weight": (48, 192), "cls_token": (1, 1, 48)},
    "a hierarchical network, .*--model.backbone": {"layer1.0.conv1.weight": (4, 4, 3, 3)},
    r"no plain vision transformer: there is no patch_embed\.proj\.weight": {"fc.weight": (2, 2)},
}  # fmt: skip


@pytest.mark.parametrize("sentence", OTHERS)
def test_other_networks_are_refused_by_what_they_are(sentence: str, tmp_path: Path) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in OTHERS[sentence].items()}
    torch.save({"state_dict": tensors}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"a.pth holds .*{sentence}"):
        load_encoder(tmp_path / "a.pth")


def test_files_and_folders_of_other_formats_are_refused_by_what_they_are(tmp_path: Path) -> None:
    torch.save({"model": MAE}, tmp_path / "a.pth")
    (tmp_path / "a.pth.gz").write_bytes(gzip.compress((tmp_path / "a.pth").read_bytes()))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.pth", "a.pth")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.pth", "a.pth")
    np.savez(tmp_path / "a.npz", kernel=np.zeros(2))
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "a.ts")
    for folder, name in (("dcp", ".metadata"), ("deepspeed", "zero_to_fp32.py"),
                         ("peft", "adapter_config.json")):  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(8))
    for name, sentence in {
        "a.h5": "it is neither a safetensors file nor one of PyTorch",
        "a.pth.gz": "it is an archive: unpack it", "a.tar": "it is an archive: unpack it",
        "a.zip": r"it is an archive of a\.pth: unpack it",
        "a.npz": r"it is an archive of kernel\.npy: .*convert it to PyTorch",
        "a.ts": "it is a TorchScript archive: save the state_dict",
        "dcp": "one of torch.distributed, which .*dcp_to_torch",
        "peft": "it holds adapters: merge them",
        "deepspeed": "one of DeepSpeed, which its zero_to_fp32.py joins",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            load_encoder(tmp_path / name)


def test_objects_of_trainers_are_skipped_and_others_refused(tmp_path: Path, monkeypatch) -> None:
    """As mmengine saves histories and Lightning the settings of OmegaConf: nothing is run."""
    for name in ("mmengine", "elsewhere"):
        module = types.ModuleType(name)
        module.History = type("History", (), {"__module__": name, "__qualname__": "History"})
        monkeypatch.setitem(sys.modules, name, module)
    history = sys.modules["mmengine"].History()
    history.values = np.arange(3)
    other = sys.modules["elsewhere"].History()
    torch.save({"model": MAE, "message_hub": {"loss": history}}, tmp_path / "a.pth")
    torch.save({"model": MAE, "message_hub": {"loss": other}}, tmp_path / "b.pth")
    monkeypatch.delitem(sys.modules, "mmengine")
    payload = read_weight_file(tmp_path / "a.pth")
    assert torch.equal(payload["model"]["cls_token"], MAE["cls_token"])
    assert not vars(payload["message_hub"]["loss"])
    with pytest.raises(UserError, match=r"it holds elsewhere\.History"):
        read_weight_file(tmp_path / "b.pth")
    save_file(dict(MAE), tmp_path / "model.safetensors")
    assert load_encoder(tmp_path / "model.safetensors", encoder_num_heads=3)


def test_backbones_start_from_folders_and_refuse_other_names(tmp_path: Path) -> None:
    """As `--model.backbone` reads them, of any timm model."""
    name, size = "test_vit", 160
    expected = randomised(timm.create_model(name, num_classes=3))
    save_file(expected.state_dict(), tmp_path / "model.safetensors")
    config = NetworkConfig(tmp_path, name, image_size=size)
    found = build_backbone(config, 3).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.state_dict().items())
    (tmp_path / "model.safetensors").unlink()
    theirs = {
        "vit.embeddings.cls_token": torch.zeros(1, 1, 64),
        "vit.embeddings.patch_embeddings.projection.weight": torch.zeros(64, 3, 16, 16),
    }
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds a network under transformers' names: give the"):
        build_backbone(config, 3)


def test_blocks_numbered_anew_in_each_stage_keep_their_names() -> None:
    """As in timm's Twins, whose first block has the name of a chunk's in DINOv2."""
    with torch.device("meta"):
        names = timm.create_model("twins_svt_small").state_dict()
    assert "blocks.0.0.norm1.weight" in names
    assert renamed_to_timm(names) == {name: name for name in names}
