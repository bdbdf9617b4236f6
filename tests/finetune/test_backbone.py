"""Classifiers on a timm backbone, and the checkpoints that they start from."""

import re
from pathlib import Path

import pytest
import timm
import torch
from randomised import randomised
from safetensors.torch import save_file

from finetune.config import NetworkConfig
from finetune.training.model import build_classifier
from finetune.training.plan import size_multiple
from mae_et import UserError
from mae_et.checkpoints.layouts.hugging_face import to_hugging_face


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("resnet18", (64, 96)), ("deit_tiny_patch16_224", (96, 224)),
     ("convnext_atto", (64, 96)),
     ("caformer_s18", (96,))],
)  # fmt: skip
def test_backbones_accept_every_size_of_their_curriculum(name: str, sizes: tuple[int, ...]) -> None:
    model = build_classifier(NetworkConfig(backbone=name, drop_path=0.1), 5).eval()
    with torch.no_grad():
        for size in sizes:
            assert model(torch.randn(1, 3, size, size)).shape == (1, 5)
    assert size_multiple(model, 224) == (16 if name.startswith("deit") else 32)


@pytest.mark.parametrize(
    "name",
    ["pvt_v2_b0", "xcit_nano_12_p16_224", "vit_tiny_r_s16_p8_224", "swin_tiny_patch4_window7_224"],
)
def test_a_backbone_s_stride_is_neither_its_first_kernel_nor_a_patch_of_features(name: str) -> None:
    with torch.device("meta"):
        assert size_multiple(timm.create_model(name), 224) == 32
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4)
        wrapped = timm.create_model("deepseek_vit_412m", depth=1)
    assert size_multiple(vit, 32) == 4  # as small as Swin's first patch
    assert size_multiple(wrapped, 224) == 14  # the patch of its encoder


def test_backbones_of_one_size_are_built_for_that_of_the_images() -> None:
    with torch.device("meta"):
        model = build_classifier(NetworkConfig(backbone="gmlp_ti16_224", image_size=64), 5)
        assert model(torch.empty(1, 3, 64, 64)).shape == (1, 5)


def test_a_backbone_loads_a_checkpoint_of_the_same_model(tmp_path: Path, capsys) -> None:
    """As from ImageNet-22K to 1K, or from SwAV: all but a head of other classes or projections."""
    torch.manual_seed(0)
    first = timm.create_model("resnet10t", num_classes=7)
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    torch.save({"state_dict": first.state_dict()}, tmp_path / "timm.pth")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "timm.pth"):
        for classes in (7, 3):
            model = build_classifier(NetworkConfig(checkpoint=path, backbone="resnet10t"), classes)
            ours, theirs = model.state_dict(), first.state_dict()
            same = {name for name in ours if torch.equal(ours[name], theirs[name])}
            assert set(ours) - same == (set() if classes == 7 else {"fc.weight", "fc.bias"})
    body = {f"module.{n}": t for n, t in first.state_dict().items() if not n.startswith("fc.")}
    ends = {"module.projection_head.0.weight": torch.ones(2, 2), "module.fc.2.bias": torch.ones(2)}
    torch.save({"state_dict": body | ends}, tmp_path / "swav.pth")
    config = NetworkConfig(checkpoint=tmp_path / "swav.pth", backbone="resnet10t")
    ours = build_classifier(config, 7).state_dict()
    assert all(torch.equal(ours[n.removeprefix("module.")], tensor) for n, tensor in body.items())
    said = "its projection is not used (projection_head.0.weight, fc.2.bias)"
    assert said in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").touch()
    with pytest.raises(UserError, match="is a run of mae-et pretrain"):
        build_classifier(NetworkConfig(checkpoint=tmp_path / "run", backbone="resnet10t"), 7)
    with pytest.raises(UserError) as caught:
        build_classifier(NetworkConfig(checkpoint=tmp_path, backbone="resnet18"), 7)
    sentence = str(caught.value)
    assert sentence.startswith(f"resnet18 and {tmp_path} differ: ")
    counts = re.findall(r"(\d+) (missing|unexpected|misshapen) \(([^)]*)\)", sentence)
    assert [kind for _, kind, _ in counts] == ["missing", "unexpected", "misshapen"]
    assert "conv1.weight is [" not in sentence  # a deep stem has other names
    for count, _, names in counts:
        listed = re.split(r", (?![\d ]|not)", names)
        assert len(listed) == (min(int(count), 5) + (int(count) > 5))


@pytest.mark.parametrize(
    ("trained", "backbone", "size"),
    [("deit_tiny_patch16_224", "deit_tiny_patch16_224", 96),
     ("vit_tiny_patch16_224", "deit_tiny_patch16_224", 96),
     ("vit_small_patch32_224", "vit_small_patch16_224", 64)],
)  # fmt: skip
def test_a_vit_backbone_s_checkpoint_is_resampled_as_timm_does(
    tmp_path: Path, trained: str, backbone: str, size: int
) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(trained, img_size=64, num_classes=7).state_dict()
    save_file(theirs, tmp_path / "model.safetensors")
    settings = {"checkpoint": tmp_path, "backbone": backbone, "image_size": size}
    ours = build_classifier(NetworkConfig(**settings), 7).eval().state_dict()
    expected = dict(theirs)
    grid = [size // 16] * 2
    expected["pos_embed"] = timm.layers.resample_abs_pos_embed(theirs["pos_embed"], grid)
    kernel = timm.layers.resample_patch_embed(theirs["patch_embed.proj.weight"], [16, 16])
    expected["patch_embed.proj.weight"] = kernel
    assert theirs["pos_embed"].shape != ours["pos_embed"].shape
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    fewer = build_classifier(NetworkConfig(**settings), 3).state_dict()
    new = {name for name in ours if not torch.equal(ours[name], fewer[name])}
    assert new == {"head.weight", "head.bias"}


def test_a_checkpoint_that_timm_cannot_resample_is_refused(tmp_path: Path) -> None:
    """Another depth is no matter of size; and timm's function fails at unknown names."""
    torch.manual_seed(0)
    deit = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=11).state_dict()
    strange = timm.create_model("caformer_s18").state_dict()
    strange["strange.weight"] = strange.pop("stem.conv.weight")
    for backbone, weights, sentence in (
        ("deit_tiny_patch16_224", deit, r"differ: 12 missing \(blocks\.11\.norm1\.weight, "),
        ("caformer_s18", strange, r"differ: 1 missing \(stem\.conv\.weight\); 1 unexpected"),
    ):
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=sentence):
            build_classifier(
                NetworkConfig(checkpoint=tmp_path, backbone=backbone, image_size=96), 5
            )


def test_an_error_of_timm_s_own_is_not_taken_for_a_network_of_any_size(monkeypatch) -> None:
    def create_model(name: str, **settings: object) -> torch.nn.Module:
        if "img_size" in settings:
            raise TypeError("can only concatenate lists")
        return torch.nn.Identity()

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(UserError, match="can only concatenate") as caught:
        build_classifier(NetworkConfig(backbone="resnet18"), 5)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_backbone_loads_a_folder_of_transformers_with_its_heads(tmp_path: Path) -> None:
    first = randomised(timm.create_model("test_vit", num_classes=0))
    save_file(to_hugging_face(first.state_dict()), tmp_path / "model.safetensors")
    config = NetworkConfig(checkpoint=tmp_path, backbone="test_vit", image_size=160)
    model = build_classifier(config, 3).state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in first.state_dict().items())
    (tmp_path / "config.json").write_text('{"model_type": "vit", "num_attention_heads": 8}')
    with pytest.raises(UserError, match=r"the network has 2 heads, .* records 8"):
        build_classifier(config, 3)
