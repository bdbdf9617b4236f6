"""Encoders other than a plain ViT-B of other sizes: pre-trained, and what comes after."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from classifiers import vit_of
from safetensors.torch import load_file

from finetune import ClassifierConfig, EvaluateConfig, ProbeConfig, classify, evaluate, knn
from mae_et import UserError, export, load_config, load_pretrained
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.writers.export import Format
from mae_et.checkpoints.writers.tensor_files import export_encoder
from mae_et.config.files import to_yaml
from mae_et.models.mae import MaskedAutoencoder

SMALL = ["--model.encoder_embed_dim=48", "--model.encoder_depth=2", "--model.encoder_num_heads=4"]
ENCODERS = {
    # The architecture's own 3, where 6 are published for this width.
    "few heads": ["--model.encoder=vit_tiny_patch16_224", "--model.encoder_num_heads=null",
                  "--model.encoder_embed_dim=384", "--model.encoder_depth=1"],
    "longer product": ["--model.encoder=vit_giant_patch14_224", *SMALL],
    "LayerScale": ["--model.encoder=vit_small_patch16_36x1_224", *SMALL],
    "parallel": ["--model.encoder=vit_small_patch16_18x2_224", *SMALL],
    "gated product": ["--model.encoder=vit_giant_patch14_dinov2", *SMALL],
}  # fmt: skip


def checkpoint(tiny, path: Path, *flags: str) -> tuple[MaskedAutoencoder, Path]:
    """Return a model of no symmetry and the checkpoint of its run, as if it had been trained."""
    config = tiny(*flags)
    torch.manual_seed(0)
    model = MaskedAutoencoder.from_config(config.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"config": to_yaml(config), "plan": {}, "model": model.state_dict()}, path)
    return model, path


@pytest.mark.parametrize("flags", ENCODERS.values(), ids=ENCODERS)
def test_a_vit_built_from_a_run_gives_the_pretrained_tokens(
    tiny, tmp_path: Path, flags: list[str]
) -> None:
    """Whatever architecture, heads and overrides: as pre-training encodes, and as kNN sees it."""
    model, path = checkpoint(tiny, tmp_path / "run.pt", *flags)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.encode(images)
        found = vit_of(load_weights(path), 5, 32, pool="cls").eval().forward_features(images)
        again = load_pretrained(path).encode(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, expected)


def test_recorded_heads_win_over_given_ones(tiny, tmp_path: Path) -> None:
    _, path = checkpoint(tiny, tmp_path / "run.pt", *ENCODERS["few heads"])
    network = vit_of(load_weights(path).with_given(6), 5, 32)
    assert network.blocks[0].attn.num_heads == 3


@pytest.mark.parametrize(
    "kind",
    ["longer product", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("few heads",
     "LayerScale", "parallel"))],
)  # fmt: skip
def test_other_architectures_are_fine_tuned_resumed_scored_and_exported(
    tiny, tmp_path: Path, kind: str, monkeypatch
) -> None:
    """To the same scores; what a classifier's weights do not say stands in its folder."""
    model, path = checkpoint(tiny, tmp_path / "run.pt", *ENCODERS[kind])
    described = load_weights(path).model
    assert described is not None
    exported = tmp_path / "encoder.safetensors"
    export_encoder(model.encoder, exported, described)

    def config(start: Path, name: str) -> ClassifierConfig:
        flags = [
            f"--model.checkpoint={start}", f"--output.dir={tmp_path / name}",
            "--model.image_size=32", "--data.name=synthetic", "--data.synthetic_size=32",
            "--data.synthetic_train=16", "--data.synthetic_val=10", "--optim.batch_size=8",
            "--curriculum.epochs=2", "--efficiency={num_workers: 0, device: cpu}",
            "--output.tensorboard=false", "--output.checkpoint_every=1",
        ]  # fmt: skip
        return load_config(ClassifierConfig, [], flags)

    first = config(exported, "tuned")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["finetune.training.classifier"], "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            classify(first)
    results = classify(first)  # around its own checkpoint
    found = evaluate(EvaluateConfig(tmp_path / "tuned", device="cpu", num_workers=0))
    assert (found["top1"], found["val_loss"]) == (
        results["top1"],
        pytest.approx(results["val_loss"]),
    )
    assert classify(config(tmp_path / "tuned", "again"))["val_images"] == 10
    assert "knn" in knn(ProbeConfig(path, device="cpu", num_workers=0))
    # Both open in timm under the name of the architecture.
    for start, classes in ((path, 0), (tmp_path / "tuned", 10)):
        network = timm.create_model(
            described.encoder, img_size=32, patch_size=8, num_classes=classes, num_heads=3,
            embed_dim=model.encoder.embed_dim, depth=len(model.encoder.blocks),
            global_pool="avg" if classes else "token",
        )  # fmt: skip
        written = export(start, "timm", tmp_path / f"{classes}.safetensors")
        network.load_state_dict(load_file(written))


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("layout", ["mae", "hf"])
def test_layouts_of_plain_blocks_refuse_other_blocks(tiny, tmp_path: Path, layout: Format) -> None:
    _, path = checkpoint(tiny, tmp_path / "run.pt", *ENCODERS["LayerScale"])
    with pytest.raises(UserError, match=rf"format {layout} has no place for blocks\.0\.ls1\.gamma"):
        export(path, layout, tmp_path / "out")
