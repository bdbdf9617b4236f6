"""Evaluation: which images and classes are scored, and classifiers of others."""

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from randomised import randomised
from safetensors.torch import save_file

from finetune import ClassifierConfig, EvaluateConfig, ProbeConfig, classify, evaluate, knn
from finetune.evaluation import trained_classifier
from finetune.training.results import PeriodicEvaluation
from mae_et import UserError, export, load_config
from mae_et.checkpoints.weight_files import read_weight_file
from mae_et.config.commands import ReconstructConfig
from mae_et.config.data import DataConfig
from mae_et.data.transforms import normalise
from mae_et.reconstruction import reconstruct
from mae_et.runtime.console import notify

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "grey": (99, 99, 99), "red": (255, 0, 0)}
SMALL = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}


@pytest.fixture(autouse=True)
def _forget_notices():
    notify.cache_clear()


def folder(top: Path, classes: dict[str, str], images: int = 5) -> Path:
    """Write a folder of classes, whose images have the colour named."""
    for name, colour in classes.items():
        for number in range(images):
            path = top / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), COLOURS[colour]).save(path)
    return top


def score(checkpoint: Path, root: Path, **settings) -> dict:
    data = DataConfig(root=root)
    return evaluate(EvaluateConfig(checkpoint, data=data, num_workers=0, device="cpu", **settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the run of a classifier that knows four colours, trained without split folders."""
    top = tmp_path_factory.mktemp("run")
    root = folder(top / "colours", {name: name for name in COLOURS}, images=15)
    flags = [
        "--model.backbone=test_resnet", "--model.image_size=32", f"--data.root={root}",
        "--optim.batch_size=8", "--optim.base_lr=0.1", "--curriculum.epochs=10",
        "--efficiency={num_workers: 0, device: cpu}", "--output.tensorboard=false",
        f"--output.dir={top / 'run'}",
    ]  # fmt: skip
    assert classify(load_config(ClassifierConfig, [], flags))["top1"] == 100
    return top / "run"


def test_a_run_s_own_folder_is_scored_on_the_images_held_out(run: Path, capsys) -> None:
    results = evaluate(EvaluateConfig(run, num_workers=0, device="cpu"))
    assert (results["val_images"], results["top1"]) == (12, 100)
    assert "scoring the 12 of 60 images that were held out in training" in capsys.readouterr().err


def test_scores_name_the_weights_that_were_selected_on_the_images(run: Path, capsys) -> None:
    found = {}
    for weights in ("last", "best"):
        results = evaluate(EvaluateConfig(run, num_workers=0, device="cpu", weights=weights))
        said = "weights best were selected on these images" in capsys.readouterr().err
        assert said == (weights == "best")
        found[weights] = results
        assert results["provenance"]["weights_of"] == weights
        assert results["provenance"]["image_size"] == [32, 32]
        assert results["provenance"]["val_images"] == results["val_images"]
    assert "settings" not in found["last"]
    assert found["best"]["settings"] == "weights=best"
    last, best = (read_weight_file(run / f"{name}.safetensors") for name in ("model", "best"))
    same = all(torch.equal(last[name], best[name]) for name in last)
    digests = {results["provenance"]["weights"] for results in found.values()}
    assert len(digests) == (1 if same else 2)


def test_a_run_on_a_convnet_is_probed_by_its_pooled_features(
    run: Path, tmp_path: Path, capsys
) -> None:
    results = knn(ProbeConfig(run, num_workers=0, device="cpu", neighbours=3, output=tmp_path))
    assert (results["knn"], results["provenance"]["val_images"]) == (100, 12)
    assert "features: pooled by the network, images of 32 pixels" in capsys.readouterr().err
    with pytest.raises(UserError, match="is a classifier's run, not a masked autoencoder's"):
        reconstruct(ReconstructConfig(run))


def test_a_share_of_a_short_run_scores_at_most_once_an_epoch() -> None:
    plan = SimpleNamespace(dataset_size=240, batch_size=64)
    run: Any = SimpleNamespace(in_steps=lambda every: 1, plan=plan)
    images: Any = None
    assert PeriodicEvaluation(run, "1%", images).every == 4
    assert PeriodicEvaluation(run, 1, images).every == 1


def test_every_image_of_another_folder_without_splits_is_scored(run, tmp_path, capsys) -> None:
    results = score(run, folder(tmp_path / "other", {name: name for name in COLOURS}))
    assert (results["val_images"], results["top1"]) == (20, 100)
    said = capsys.readouterr().err
    assert "has no split folders: scoring all of its images" in said
    assert "classes matched by name" in said


def test_a_quick_look_draws_images_of_all_classes(run, tmp_path, capsys) -> None:
    root = folder(tmp_path / "other", {name: name for name in COLOURS})
    results = score(run, root, max_images=8, output=tmp_path / "tables")
    assert "max_images: 8 of 20 val images, drawn evenly" in capsys.readouterr().err
    assert (results["val_images"], results["settings"]) == (8, "max_images=8")
    assert results["provenance"]["val_images"] == 8
    with (tmp_path / "tables" / "classes.csv").open() as file:
        assert [row["images"] for row in csv.DictReader(file)] == ["2"] * 4
    with pytest.raises(UserError, match="max_images"):
        score(run, root, max_images=0)


def test_keys_that_would_change_nothing_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a run, which is scored at its own size, 32 pixels"):
        score(run, tmp_path, image_size=64)
    for key in ({"architecture": "test_vit"}, {"checkpoint_key": "ema"}, {"encoder_num_heads": 3}):
        with pytest.raises(
            UserError, match=f"{next(iter(key))} is for other checkpoints: .* a run"
        ):
            score(run, tmp_path, **key)
    with pytest.raises(UserError, match="the network named by architecture has its own"):
        score(run, tmp_path, architecture="test_vit", encoder_num_heads=3)
    with pytest.raises(UserError, match="weights best needs a classifier's run folder"):
        score(Path("resnet18"), folder(tmp_path, {"red": "red", "grey": "grey"}), weights="best")


def test_a_part_of_the_classes_is_scored_without_the_others(run, tmp_path, capsys) -> None:
    """As ImageNet-A and -R: a class that the data lack is no candidate."""
    root = folder(tmp_path / "part", {"red": "red", "blue": "grey"})
    results = score(run, root, output=tmp_path / "tables")
    assert (results["classes"], results["classes_of_checkpoint"]) == (2, 4)
    assert "2 of 4: the other classes are not candidates" in capsys.readouterr().err
    with (tmp_path / "tables" / "confusion.csv").open() as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["", "blue", "red"]
    # Grey images were the class grey to all four outputs; of two they are one of the two.
    assert sum(map(int, rows[1][1:])) == 5
    with pytest.raises(UserError, match=r"are not among them \(pink\)"):
        score(run, folder(tmp_path / "unknown", {"red": "red", "pink": "red"}))


@pytest.mark.parametrize("train", [COLOURS, ["green", "red"], ["pink"]])
def test_a_validation_split_is_scored_by_its_own_classes(run, tmp_path, train) -> None:
    """Another dataset, whose training split does not matter; of the run's own it does."""
    folder(tmp_path / "lacks" / "train", dict.fromkeys(train, "red"), images=1)
    folder(tmp_path / "lacks" / "val", {"red": "red", "grey": "grey"})
    results = score(run, tmp_path / "lacks")
    assert (results["val_images"], results["top1"], results["classes"]) == (10, 100, 2)


def test_images_of_one_class_are_no_evaluation(run, tmp_path) -> None:
    """Of one candidate every image is right, whatever the classifier."""
    folder(tmp_path / "one" / "train", {name: name for name in COLOURS}, images=1)
    folder(tmp_path / "one" / "val", {"red": "blue"})
    with pytest.raises(UserError, match=r"an evaluation needs .* has one class \(red\)"):
        score(run, tmp_path / "one")


def test_an_output_that_cannot_be_written_is_refused_before_scoring(run, tmp_path) -> None:
    (tmp_path / "file").touch()
    data = folder(tmp_path / "data", {"red": "red", "grey": "grey"})
    flags = {"data": DataConfig(root=data), "output": tmp_path / "file" / "tables"}
    for command, config in (
        (evaluate, EvaluateConfig(run, **flags)),
        (knn, ProbeConfig(run, **flags)),
    ):
        with pytest.raises(UserError, match=r"file/tables cannot be written to: Not a directory"):
            command(config)
        with pytest.raises(UserError, match=r"whose results.json would be replaced"):
            command(replace(config, output=run))


def assert_scores(found: dict, logits_of, root: Path) -> None:
    """Compare with top-1 and loss of a network on the images of a folder, computed plainly."""
    logits, labels = [], []
    for label, name in enumerate(sorted(COLOURS)):
        for path in sorted((root / name).iterdir()):
            image = torch.tensor(list(Image.open(path).tobytes()), dtype=torch.uint8)
            image = image.view(1, 32, 32, 3).permute(0, 3, 1, 2)
            data = DataConfig()
            with torch.no_grad():
                logits.append(logits_of(normalise(image, data.mean, data.std)))
            labels.append(label)
    joined, truth = torch.cat(logits), torch.tensor(labels)
    top1 = 100 * (joined.argmax(1) == truth).float().mean().item()
    assert found["top1"] == pytest.approx(top1, abs=1e-3)
    assert found["val_loss"] == pytest.approx(F.cross_entropy(joined, truth).item(), abs=1e-4)


def vit(**settings) -> torch.nn.Module:
    return randomised(
        timm.create_model("vit_tiny_patch16_224", num_classes=4, **(SMALL | settings))
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"reg_tokens": 4, "no_embed_class": True}, {"init_values": 1.0}, {"global_pool": "avg"},
     {"class_token": False, "global_pool": "avg"}],
    ids=["class token", "registers", "LayerScale", "mean", "no class token"],
)  # fmt: skip
def test_a_file_of_a_timm_classifier_scores_as_in_timm(settings: dict, tmp_path: Path) -> None:
    network = vit(**settings)
    save_file(dict(network.state_dict()), tmp_path / "weights.safetensors")
    root = folder(tmp_path / "data", {name: name for name in COLOURS})
    found = score(tmp_path / "weights.safetensors", root, encoder_num_heads=3)
    assert_scores(found, network, root)


def test_a_size_that_patches_do_not_tile_is_refused(tmp_path: Path) -> None:
    save_file(dict(vit().state_dict()), tmp_path / "weights.safetensors")
    config = EvaluateConfig(tmp_path / "weights.safetensors", encoder_num_heads=3, image_size=33)
    with pytest.raises(UserError, match="image_size 33 is not a multiple of the patch size"):
        trained_classifier.load_classifier(config, None)


def test_a_grey_classifier_with_layerscale_is_scored_on_grey_images(tmp_path: Path) -> None:
    network = vit(init_values=1.0, in_chans=1)
    save_file(dict(network.state_dict()), tmp_path / "weights.safetensors")
    config = EvaluateConfig(tmp_path / "weights.safetensors", encoder_num_heads=3)
    found = trained_classifier.load_classifier(config, None)
    assert (found.channels, found.image_size) == (1, (32, 32))


def test_a_timm_name_and_a_named_file_score_as_in_timm(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=4).eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "resnet.pth")
    root = folder(tmp_path / "data", {name: name for name in COLOURS})
    monkeypatch.setattr(trained_classifier, "fetch_from_hub", lambda name: network)
    named = score(Path("resnet10t"), root, image_size=32)
    file = score(tmp_path / "resnet.pth", root, architecture="resnet10t", image_size=32)
    for found in (named, file):
        assert_scores(found, network, root)
    network.reset_classifier(0)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "body.pth")
    with pytest.raises(UserError, match=r"body\.pth is not a classifier: it has no fc\.bias"):
        score(tmp_path / "body.pth", root, architecture="resnet10t", image_size=32)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Dinov2WithRegisters"])
def test_a_hugging_face_classifier_scores_as_in_transformers(tmp_path: Path, kind: str) -> None:
    import transformers

    torch.manual_seed(0)
    names = ["red", "grey", "green", "blue"]
    more = {"intermediate_size": 96} if kind == "ViT" else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3,
        image_size=32, patch_size=8, id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)}, initializer_range=0.2, **more,
    )  # fmt: skip
    network = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    network.save_pretrained(tmp_path / "vit")
    root = folder(tmp_path / "data", {name: name for name in COLOURS})
    order = [names.index(name) for name in sorted(COLOURS)]
    assert_scores(score(tmp_path / "vit", root), lambda x: network(x).logits[:, order], root)
    if kind == "Dinov2":
        with pytest.raises(UserError, match="the mean of the patches, which export does not"):
            export(tmp_path / "vit", "timm", tmp_path / "vit.safetensors")
