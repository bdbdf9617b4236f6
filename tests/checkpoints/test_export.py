"""Each exported layout opens in the other library with no conversion and gives the same numbers."""

import json
from pathlib import Path

import pytest
import timm
import torch
from classifiers import vit_of
from safetensors.torch import load_file, save_file
from tiny_run import GOLDEN

from finetune import ClassifierConfig, EvaluateConfig, classify, evaluate
from finetune.config import Probe
from mae_et import UserError, export, load_config, load_encoder, load_pretrained, mask_from_noise
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.weight_files import read_weight_file
from mae_et.checkpoints.writers.hugging_face import assumed_preprocessing, image_processor
from mae_et.cli.main import main
from mae_et.config.files import to_yaml
from mae_et.config.model import Pool
from mae_et.io.seals import seal
from mae_et.models.mae import MaskedAutoencoder

HEADS = {"encoder_num_heads": 3, "decoder_num_heads": 4}
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


def test_timm_opens_the_folder_of_an_encoder_with_the_statistics_of_its_images(
    golden, tmp_path, capsys
) -> None:
    folder = export(TINY, "timm", tmp_path / "vit", **HEADS)
    assert "records no statistics; config.json has ImageNet's" in capsys.readouterr().err
    encoder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        same(encoder.forward_features(golden["images"]), golden["features_unmasked"])
    images = timm.data.resolve_model_data_config(encoder)
    assert (images["input_size"], images["mean"]) == ((3, 64, 64), [0.485, 0.456, 0.406])
    same(load_encoder(folder).forward_features(golden["images"]), golden["features_unmasked"])


def test_the_mae_layout_has_the_released_file_s_names_and_tensors(tmp_path) -> None:
    ours = read_weight_file(export(TINY, "mae", tmp_path / "out.pth", **HEADS))["model"]
    theirs = read_weight_file(TINY)["model"]
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        atol = 1e-6 if "pos_embed" in name else 0  # positions are computed anew
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol)


@pytest.mark.parametrize("layout", ["timm", "mae", "hf"])
def test_exports_are_reproducible_byte_for_byte(layout, tmp_path) -> None:
    first, *others = (export(TINY, layout, tmp_path / name, **HEADS) for name in ("a", "b", "cc"))
    files = [path for path in sorted(first.rglob("*")) if path.is_file()] or [first]
    for path in files:
        for other in others:
            assert path.read_bytes() == (other / path.relative_to(first)).read_bytes(), path.name


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
    back = read_weight_file(export(folder, "mae", tmp_path / "back.pth"))["model"]
    encoder = load_file(export(folder, "timm", tmp_path / "encoder.safetensors"))
    first = read_weight_file(export(TINY, "mae", tmp_path / "first.pth", **HEADS))["model"]
    assert set(back) == set(first)
    for name, tensor in first.items():
        assert torch.equal(back[name], tensor), name
    for name, tensor in encoder.items():
        assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("kind", ["timm", "mae"])
def test_exports_record_the_heads_that_were_given(tmp_path: Path, kind: str) -> None:
    path = export(TINY, kind, tmp_path / ("a.safetensors" if kind == "timm" else "a.pth"), **HEADS)
    found = load_weights(path)
    assert {name: getattr(found, name) for name in HEADS} == HEADS
    for text in ('{"encoder_num_heads": 3.0}', '{"norm_eps": "x"}', '{"path": "y"}', "[1]"):
        torch.save({"model": found.encoder, "mae_et.settings": text}, tmp_path / "b.pth")
        with pytest.raises(UserError, match=r"b\.pth holds no weights of ours"):
            load_weights(tmp_path / "b.pth")


def test_assumed_statistics_have_one_number_for_each_channel(tmp_path: Path, capsys) -> None:
    for channels in (1, 3, 4):
        processor = image_processor(assumed_preprocessing(tmp_path, channels), 32, channels)
        assert len(processor["image_mean"]) == len(processor["image_std"]) == channels
        assert "records no statistics of its images: mean [0." in capsys.readouterr().err


def test_the_config_of_a_hugging_face_folder_sets_heads_and_target(tmp_path: Path) -> None:
    folder = export(TINY, "hf", tmp_path / "hf", **HEADS)
    model = load_pretrained(folder)
    assert (model.encoder.blocks[0].attn.num_heads, model.target) == (3, "norm_pix")
    about = json.loads((folder / "config.json").read_text())
    assert about["layer_norm_eps"] == 1e-6
    (folder / "config.json").write_text(json.dumps(about | {"norm_pix_loss": False}))
    assert load_weights(folder).target == "pixel"


def run_with(tiny, path: Path, *flags: str) -> Path:
    """Write a checkpoint of a run of the small model, untrained."""
    config = tiny(*flags)
    model = MaskedAutoencoder.from_config(config.model)
    torch.save({"config": to_yaml(config), "plan": {}, "model": model.state_dict()}, path)
    return path


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format must be timm, hf or mae"):
        export(TINY, "onnx", tmp_path / "out", **HEADS)  # type: ignore[arg-type]


def test_an_exported_hog_run_is_read_back_with_its_target(tmp_path: Path, tiny) -> None:
    torch.manual_seed(0)
    hog = run_with(tiny, tmp_path / "hog.pt", "--model.target=hog", "--model.hog_cell=4")
    exported = load_pretrained(export(hog, "mae", tmp_path / "hog.pth"))
    assert (exported.target, exported.patch_target.cell) == ("hog", 4)
    mask, images = mask_from_noise(torch.rand(2, 16), 0.75), torch.randn(2, 3, 32, 32)
    ours = load_pretrained(hog)
    with torch.no_grad():
        assert torch.equal(exported(images, mask).loss, ours(images, mask).loss)
    assert load_pretrained(tmp_path / "hog.pth", decoder=False).decoder is None


def test_an_encoder_loads_although_its_decoder_does_not_fit(tmp_path: Path) -> None:
    payload = read_weight_file(TINY)
    payload["model"]["decoder_pred.weight"] = torch.zeros(7, 32)
    torch.save(payload, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"misshapen \(decoder\.pred\.weight"):
        load_pretrained(tmp_path / "other.pth", **HEADS)
    encoder = load_pretrained(tmp_path / "other.pth", encoder_num_heads=3, decoder=False)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(encoder.encode(images), load_pretrained(TINY, **HEADS).encode(images))
    export(tmp_path / "other.pth", "timm", tmp_path / "timm.safetensors", encoder_num_heads=3)


def classifier_of(tmp_path: Path, pool: Pool, probe: Probe) -> tuple[torch.nn.Module, Path]:
    """Return a classifier of 7 classes with trained positions, and the folder of its run."""
    torch.manual_seed(0)
    network = vit_of(load_weights(TINY).with_given(3), 7, 96, pool=pool, probe=probe).eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and name != "head.0.running_var":
                tensor.add_(0.3 * torch.randn_like(tensor))
            elif name == "head.0.running_var":
                tensor.copy_(0.1 + torch.rand_like(tensor))
    folder = tmp_path / "run"
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    about = {"classes": list("abcdefg"), "encoder_num_heads": 3}
    (folder / "classes.json").write_text(json.dumps(seal(about)))
    return network, folder


@pytest.mark.parametrize("source", ["run folder", "its safetensors", "released .pth"])
@pytest.mark.parametrize(
    ("pool", "probe", "pooling"),
    [("mean", "none", "avg"), ("cls", "none", "token"), ("cls", "linear", "token"),
     ("mean", "linear", "avg"), ("mean", "attentive", "map")],
)  # fmt: skip
def test_a_classifier_gives_the_same_logits_from_every_layout_that_holds_it(
    tmp_path: Path, pool: Pool, probe: Probe, pooling: str, source: str
) -> None:
    network, checkpoint = classifier_of(tmp_path, pool, probe)
    if source == "its safetensors":
        checkpoint = checkpoint / "model.safetensors"
    elif source == "released .pth":
        torch.save({"model": network.state_dict()}, tmp_path / "released.pth")
        checkpoint = tmp_path / "released.pth"
    heads = None if source == "run folder" else HEADS["encoder_num_heads"]
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        logits = network(images)
    theirs = timm.create_model(
        "vit_base_patch16_224", img_size=96, patch_size=8, embed_dim=48, depth=3, num_heads=3,
        num_classes=7, global_pool=pooling,
    ).eval()  # fmt: skip
    path = export(checkpoint, "timm", tmp_path / "out" / "model.safetensors")
    theirs.load_state_dict(load_file(path), strict=True)
    assert torch.equal(theirs.pos_embed, network.pos_embed)
    with torch.no_grad():
        found = theirs(images)
    # A probe's normalisation is folded into the head; all else is to the bit.
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if probe == "linear" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found, logits, **tolerance)

    folder = export(checkpoint, "timm", tmp_path / "folder", heads)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(images), logits, **tolerance)
    about = json.loads((folder / "config.json").read_text())
    assert about.get("label_names") == (list("abcdefg") if source == "run folder" else None)

    if pool == "mean":
        with pytest.raises(UserError, match=r"this classifier has \w+ pooling: use timm"):
            export(checkpoint, "hf", tmp_path / "hf")
    if probe == "attentive":
        with pytest.raises(UserError, match="format mae holds no attentive pooling"):
            export(checkpoint, "mae", tmp_path / "mae.pth")
        return
    path = export(checkpoint, "mae", tmp_path / "mae.pth")
    ours = vit_of(load_weights(path).with_given(3), 7, 96, pool=pool, probe=probe).eval()
    with torch.no_grad():
        assert torch.equal(ours(images), logits)
    names = set(read_weight_file(path)["model"])
    assert names == set(network.state_dict())  # those of the published files, as timm's are


def test_a_fine_tuned_run_scores_the_same_after_export(tmp_path: Path, capsys) -> None:
    """Through the command line, for images larger than those of pre-training."""
    encoder = export(TINY, "timm", tmp_path / "encoder.safetensors", **HEADS)
    flags = [
        f"--model.checkpoint={encoder}", "--model.encoder_num_heads=3", "--model.image_size=72",
        "--data.synthetic_size=72", "--data.synthetic_train=16", "--data.synthetic_val=20",
        "--optim.batch_size=8", "--optim.base_lr=0.1", "--curriculum.epochs=2",
        "--efficiency.num_workers=0", "--efficiency.device=cpu", f"--output.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    results = classify(load_config(ClassifierConfig, [], flags))
    trained = load_weights(tmp_path / "run").encoder["pos_embed"]
    assert trained.shape[1] == 82
    for kind in ("mae", "timm"):
        output = tmp_path / f"{kind}.file"
        arguments = [f"--checkpoint={tmp_path / 'run'}", f"--format={kind}", f"--output={output}"]
        assert main(["export", *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["output"] == str(output)
        assert torch.equal(load_weights(output).encoder["pos_embed"], trained)
        data = load_config(ClassifierConfig, [], flags).data
        scores = evaluate(
            EvaluateConfig(
                output, data=data, image_size=72, encoder_num_heads=3, num_workers=0, device="cpu"
            )
        )
        assert {name: scores[name] for name in ("top1", "val_loss")} == {
            name: results[name] for name in ("top1", "val_loss")
        }


def test_classifiers_that_timm_would_not_load_are_refused_with_what_differs(tmp_path: Path) -> None:
    network, _ = classifier_of(tmp_path, "mean", "none")
    weights = network.state_dict()
    for change, sentence in (
        ({"rope": torch.zeros(1)}, r"fit timm's VisionTransformer: 1 unexpected \(rope\)$"),
        ({"head.bias": None}, r"1 missing \(head\.bias\)$"),
        ({"head.weight": None}, r"1 missing \(head\.weight\)$"),
        ({"head.running_mean": torch.zeros(48)}, r"1 missing \(head\.0\.running_var\)$"),
        (
            {"blocks.2.norm1.bias": torch.zeros(3)},
            r"1 misshapen \(blocks\.2\.norm1\.bias is \[3\], ",
        ),
    ):
        changed = {name: t for name, t in (weights | change).items() if t is not None}
        torch.save({"model": changed}, tmp_path / "changed.pth")
        for kind in ("timm", "mae"):
            with pytest.raises(UserError, match=sentence):
                export(tmp_path / "changed.pth", kind, tmp_path / "out")
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="a classifier's run that is not finished"):
        export(tmp_path / "run", "timm", tmp_path / "out")


SMALL = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}


@pytest.mark.parametrize("settings", [{"qkv_bias": False}, {"mlp_ratio": 2}], ids=str)
def test_classifiers_of_other_blocks_keep_their_logits_or_are_refused(
    tmp_path: Path, settings: dict[str, float]
) -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL, **settings).eval()
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="format mae holds an MLP of 4 widths and a bias of qkv"):
        export(tmp_path / "vit.pth", "mae", tmp_path / "mae.pth", encoder_num_heads=3)
    folder = export(tmp_path / "vit.pth", "hf", tmp_path / "hf", encoder_num_heads=3)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    assert theirs.config.qkv_bias == settings.get("qkv_bias", True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits, network(images))


@pytest.mark.parametrize("settings", [{"reg_tokens": 2}, {"class_token": False}], ids=str)
def test_classifiers_of_other_tokens_are_refused(tmp_path: Path, settings: dict[str, int]) -> None:
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, global_pool="avg", **SMALL, **settings
    )
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="registers, or without a class token, which export does"):
        export(tmp_path / "vit.pth", "timm", tmp_path / "a.safetensors", encoder_num_heads=3)


def test_a_misleading_ending_and_files_of_a_run_are_refused(tmp_path: Path) -> None:
    for layout, name in (("timm", "a.pth"), ("mae", "a.safetensors"), ("hf", "a.bin")):
        with pytest.raises(UserError, match=f"format {layout} writes a"):
            export(TINY, layout, tmp_path / name, **HEADS)
    (tmp_path / "plan.json").touch()
    for layout, path in (("timm", tmp_path / "model.safetensors"), ("hf", tmp_path)):
        with pytest.raises(UserError, match="would overwrite a file of the run"):
            export(TINY, layout, path, **HEADS)
