"""Classifiers on timm backbones as folders that timm opens by itself."""

import functools
from pathlib import Path

import pytest
import timm
import torch

from finetune import ClassifierConfig, EvaluateConfig, classify, evaluate
from finetune.evaluation.trained_classifier import load_classifier
from mae_et import load_config
from mae_et.cli.main import main

NARROW = {"embed_dim": 24, "depths": (2, 2, 2, 2)}


@pytest.mark.parametrize(
    ("name", "settings"), [("test_resnet", {}), ("swinv2_tiny_window8_256", NARROW)]
)
def test_timm_opens_a_run_s_export_with_equal_logits(
    tmp_path: Path, monkeypatch, name: str, settings: dict
) -> None:
    """Also where windows follow the image size; and evaluate scores the folder as the run."""
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **settings))
    run, folder = tmp_path / "run", tmp_path / "out"
    flags = [
        f"--model.backbone={name}", "--model.image_size=64", "--data.name=synthetic",
        "--data.synthetic_size=64", "--data.synthetic_train=8", "--data.synthetic_val=10",
        "--optim.batch_size=8", "--curriculum.epochs=1", "--data.eval_crop=0.9",
        "--efficiency={num_workers: 0, device: cpu}", "--output.tensorboard=false",
        "--output.evaluate_every=null", f"--output.dir={run}",
    ]  # fmt: skip
    config = load_config(ClassifierConfig, [], flags)
    classify(config)
    assert main(["export", str(run), "--format=timm", f"--output={folder}"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = load_classifier(EvaluateConfig(run), config).network.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs(images), ours(images))
    expected = timm.data.resolve_model_data_config(theirs)
    assert (expected["input_size"], expected["crop_pct"]) == ((3, 64, 64), 0.9)
    first, again = (
        evaluate(EvaluateConfig(path, data=config.data, device="cpu", num_workers=0))
        for path in (run, folder)
    )
    assert again["val_loss"] == first["val_loss"]
    assert main(["export", str(run), "--format=timm", f"--output={run}"]) == 2
