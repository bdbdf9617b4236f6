"""Fine-tuning, probes and supervised training, on networks that train in seconds."""

import csv
import json
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
from image_files import encoded, save, write_shard
from safetensors.torch import load_file, save_file
from steps import signal_at, train_with
from timm.models import save_for_hf
from user_errors import error_of

from finetune import ClassifierConfig, EvaluateConfig, classify, evaluate
from finetune.run_folder import read_classifier_config
from finetune.training import results as results_module
from finetune.training.model import build_classifier
from finetune.training.results import PeriodicEvaluation
from mae_et import Interrupted, UserError, load_config
from mae_et.checkpoints.store import list_checkpoints, newest_checkpoint
from mae_et.cli.commands import config_of
from mae_et.cli.main import main
from mae_et.config.commands import PrepareConfig
from mae_et.config.data import DataConfig
from mae_et.data.prepare import prepare
from mae_et.io.metrics_file import METRICS, SCORES, read_metrics
from mae_et.io.seals import read_sealed, seal
from mae_et.monitoring.logger import RunLogger

SMALL = """
model: {image_size: 32, encoder_num_heads: 2}
data: {synthetic_size: 32, synthetic_train: 40, synthetic_val: 30, scale: [0.5, 1.0]}
curriculum: {preset: constant, epochs: 4, cost: area}
optim: {batch_size: 8, base_lr: 0.05, min_lr: 0.0, warmup_fraction: 0.2}
efficiency: {num_workers: 0, device: cpu}
output: {log_every: 4, checkpoint_every: 5, evaluate_every: 50%, tensorboard: false}
"""
RECIPE = [
    "--recipe.mixup=0.8", "--recipe.cutmix=1.0", "--recipe.smoothing=0.1", "--recipe.erasing=0.25",
    "--model.drop_path=0.3", "--optim.layer_decay=0.65", "--optim.ema=0.9",
]  # fmt: skip


def write_encoder(folder: Path) -> Path:
    """Write an encoder that is 32 wide and 2 deep, for images of 32 pixels."""
    from mae_et.models.mae import MaskedAutoencoder

    torch.manual_seed(0)
    model = MaskedAutoencoder(
        "vit_tiny_patch16_224", 32, 8, encoder_embed_dim=32, encoder_depth=2, encoder_num_heads=2,
        decoder_depth=0,
    )  # fmt: skip
    save_file(dict(model.encoder.state_dict()), folder / "encoder.safetensors")
    return folder / "encoder.safetensors"


def small_config(encoder: Path, *flags: str, run: str) -> ClassifierConfig:
    """Write a config beside an encoder, and return it; RUN is the run's folder there."""
    path = encoder.with_name("small.yaml")
    path.write_text(SMALL)
    network = [] if any("backbone" in f for f in flags) else [f"--model.checkpoint={encoder}"]
    folder = f"--output.dir={encoder.with_name(run)}"
    return load_config(ClassifierConfig, [path], [*network, folder, *flags])


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return write_encoder(tmp_path)


@pytest.fixture
def small(encoder: Path):
    def build(*flags: str, run: str = "run") -> ClassifierConfig:
        return small_config(encoder, *flags, run=run)

    return build


@pytest.fixture(scope="module")
def scored_run(tmp_path_factory) -> tuple[Path, dict]:
    """The folder and the results of a run that is not interrupted."""
    encoder = write_encoder(tmp_path_factory.mktemp("scored"))
    config = small_config(encoder, "--output.checkpoint_every=10", run="run")
    return config.output.dir, classify(config)


def classify_until(owner: object, name: str, config: ClassifierConfig) -> None:
    """Train a classifier until a function of `owner` is called."""
    with patch.object(owner, name, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        classify(config)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["val_loss"]) for row in read_metrics(run, SCORES)]


def test_evaluating_a_finished_run_gives_its_own_scores(small) -> None:
    config = small(*RECIPE)
    results = classify(config)
    folder = config.output.dir
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "plan.json", "classes.json", "metrics.jsonl", SCORES, "results.json",
            "model.safetensors", "best.safetensors"} <= names  # fmt: skip
    scores = read_metrics(folder, SCORES)
    assert [row["step"] for row in scores] == [10, 20]
    assert results["best_top1"] == max(row["top1"] for row in scores)
    assert (results["val_images"], results["images"]) == (30, 20 * config.optim.batch_size)
    again = evaluate(EvaluateConfig(folder, device="cpu", num_workers=0))
    for key in ("top1", "top5", "val_loss"):
        assert again[key] == pytest.approx(results[key], abs=1e-4)
    assert results["raw_val_loss"] != results["val_loss"]
    best = evaluate(EvaluateConfig(folder, weights="best", device="cpu", num_workers=0))
    assert best["top1"] == results["best_top1"]
    assert read_classifier_config(folder) == config


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_a_probe_does_not_change_the_encoder(small, encoder: Path, probe: str) -> None:
    flags = [f"--model.probe={probe}", "--optim.optimizer=lars", "--optim.weight_decay=0"]
    config = small(*flags, "--model.pool=cls")
    results = classify(config)
    before, after = load_file(encoder), load_file(config.output.dir / "model.safetensors")
    shared = set(before) & set(after)
    assert {"cls_token", "blocks.1.mlp.fc2.weight"} <= shared
    for name in shared:
        assert torch.equal(before[name], after[name]), name
    head = "head.1.weight" if probe == "linear" else "head.weight"
    torch.manual_seed(config.seed)
    fresh = build_classifier(config.model, 10).state_dict()[head]
    assert after[head].shape == fresh.shape
    assert not torch.equal(after[head], fresh)
    again = evaluate(EvaluateConfig(config.output.dir, device="cpu", num_workers=0))
    assert again["top1"] == results["top1"]


def test_a_moving_average_without_memory_scores_as_the_raw_weights(small) -> None:
    results = classify(small("--optim.ema=1e-9"))
    assert results["val_loss"] == pytest.approx(results["raw_val_loss"], rel=1e-5)


RESNET = ["--model.backbone=test_resnet", "--model.encoder_num_heads=null",
          "--optim.optimizer=lamb", "--curriculum.epochs=2"]  # fmt: skip
REPLAY = ["--data.replay={16: 2}", "--data.replay_images=16"]
RECTANGLE = ["--model.image_size=[16, 64]"]  # of as many patches as the square; bandwidth 16


@pytest.mark.parametrize("flags", [[*RECIPE, *REPLAY, *RECTANGLE], RESNET])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(small, flags) -> None:
    """Bit for bit, with drop path, mixing, erasing, moving average, replay and rectangles."""
    whole = small(*flags, run="whole")
    classify(whole)
    config = small(*flags)
    with pytest.raises(Interrupted):
        train_with(signal_at(6), config, classify)
    assert newest_checkpoint(config.output.dir / "checkpoints")["step"] == 7
    if config.model.checkpoint is not None:
        config.model.checkpoint.unlink()  # a resumed run does not need its starting point
    classify(config)
    weights = [(c.output.dir / "model.safetensors").read_bytes() for c in (whole, config)]
    assert weights[0] == weights[1]
    assert losses(config.output.dir) == losses(whole.output.dir)
    assert len(list_checkpoints(config.output.dir / "checkpoints")) == 2


@pytest.mark.parametrize(
    ("owner", "name"),
    [(PeriodicEvaluation, "do"), (results_module, "write_weights"), (RunLogger, "log_scores")],
)
def test_a_run_killed_before_its_score_ends_like_an_uninterrupted_one(
    small, scored_run, owner: object, name: str
) -> None:
    """With all scores, and the best weights of the step that is named, whichever came first."""
    config = small("--output.checkpoint_every=10")
    classify_until(owner, name, config)
    results = classify(config)
    whole, expected = scored_run
    assert results["best_step"] == expected["best_step"]
    best = [(folder / "best.safetensors").read_bytes() for folder in (whole, config.output.dir)]
    assert best[0] == best[1]
    assert losses(config.output.dir) == losses(whole)


def test_a_damaged_description_of_the_classes_is_refused_on_resume(small) -> None:
    config = small()
    classify_until(sys.modules[classify.__module__], "finish", config)
    path = config.output.dir / "classes.json"
    about = read_sealed(path)
    for damage in ({"classes": 3}, {"encoder": "hf-hub:some/body"}, {"encoder_num_heads": "2"}):
        path.write_text(json.dumps(seal(about | damage)))
        with pytest.raises(UserError, match=r"classes\.json is damaged"):
            classify(config)
    path.write_text(json.dumps(seal(about | {"classes": ["a"]})))
    with pytest.raises(UserError, match=r"do not fit: 2 misshapen \(head\.weight is \[10, 32\]"):
        classify(config)


def test_a_backbone_s_folder_may_be_gone_on_resume_and_evaluation(small, tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", stem_width=8, num_classes=3)
    save_for_hf(network, tmp_path / "published")
    config = small(*RESNET, f"--model.backbone=local-dir:{tmp_path / 'published'}")
    classify_until(sys.modules[classify.__module__], "finish", config)
    shutil.rmtree(tmp_path / "published")
    top1 = classify(config)["top1"]
    assert evaluate(EvaluateConfig(config.output.dir, num_workers=0))["top1"] == top1
    path = config.output.dir / "classes.json"
    about = read_sealed(path)
    assert about["backbone"]["arguments"]["stem_width"] == 8
    reads = {"architecture": "test_resnet", "arguments": {"checkpoint_path": "x"}}
    for backbone, sentence in ((3, "damaged"), (reads, "checkpoint_path is not a setting")):
        path.write_text(json.dumps(seal(about | {"backbone": backbone})))
        with pytest.raises(UserError, match=sentence):
            evaluate(EvaluateConfig(config.output.dir))


def test_images_without_a_label_are_refused_before_training(small, tmp_path: Path) -> None:
    """In tar shards where some images have no .cls, and in shards prepared from them."""
    for split in ("train", "val"):
        files = {f"{number}.png": encoded(20 * number) for number in range(12)}
        labelled = range(12 if split == "val" else 9)
        files |= {f"{number}.cls": str(number % 3).encode() for number in labelled}
        write_shard(tmp_path / "tars" / split / "0.tar", files)
    prepare(PrepareConfig(tmp_path / "shards", DataConfig(name="wds", root=tmp_path / "tars")))
    for name, root in (("wds", "tars"), ("shards", "shards")):
        flags = [f"--data.name={name}", f"--data.root={tmp_path / root}"]
        with pytest.raises(UserError, match=r"train split .* has 3 of 12 images without"):
            classify(small(*flags))
    save(tmp_path / "photos" / "train" / "a" / "1.png")
    save(tmp_path / "photos" / "train" / "2.png")
    with pytest.raises(
        UserError, match=r"no classes: some images are in no class folder \(train/C"
    ):
        classify(small(f"--data.root={tmp_path / 'photos'}"))


def test_a_run_without_validation_split_has_no_scores(small, tmp_path) -> None:
    for number in range(40):
        save(tmp_path / "only" / "train" / str(number % 2) / f"{number}.png")
    flags = [f"--data.root={tmp_path / 'only'}", "--output.evaluate_every=null"]
    results = classify(small(*flags))
    assert "top1" not in results
    assert results["steps"] == 20


def test_a_classifier_s_run_folder_is_fine_tuned_evaluated_and_probed(small, capsys) -> None:
    classify(small())
    folder = small().output.dir
    again = classify(small(f"--model.checkpoint={folder}", run="again"))
    assert again["top1"] >= 0
    assert "model   ViT of width 32 and depth 2, " in capsys.readouterr().err
    assert main(["evaluate", f"--checkpoint={folder}", "--data.synthetic_val=20"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["val_images"] == 20
    assert main(["knn", f"--checkpoint={folder}", "--num_workers=0"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"] == "synthetic"
    assert main(["export", "--format=hf", "--output=x", f"--checkpoint={folder}"]) == 2
    assert "format hf classifies by the class token" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert main(["evaluate", f"--checkpoint={folder}"]) == 2
    assert "run that is not finished" in capsys.readouterr().err


def test_evaluation_reads_mae_s_layout_and_writes_tables(small, tmp_path) -> None:
    config = small()
    results = classify(config)
    weights = load_file(config.output.dir / "model.safetensors")
    torch.save({"model": weights}, tmp_path / "mae_finetuned.pth")
    config = EvaluateConfig(
        tmp_path / "mae_finetuned.pth", data=config.data, image_size=32, encoder_num_heads=2,
        output=tmp_path / "tables", device="cpu", num_workers=0,
    )  # fmt: skip
    found = evaluate(config)
    assert found["top1"] == results["top1"]
    rows = list(csv.reader((tmp_path / "tables" / "confusion.csv").read_text().splitlines()))
    assert len(rows) == 11
    total = sum(int(n) for row in rows[1:] for n in row[1:])
    right = sum(int(rows[i + 1][i + 1]) for i in range(10))
    assert (total, 100 * right / total) == (30, pytest.approx(found["top1"], abs=1e-3))
    with (tmp_path / "tables" / "classes.csv").open() as file:
        assert [row["images"] for row in csv.DictReader(file)] == ["3"] * 10


def test_mistakes_get_one_sentence_and_exit_status_2(small, encoder, tmp_path, capsys) -> None:
    small()
    base = ["finetune", f"--config={tmp_path / 'small.yaml'}", f"--output.dir={tmp_path / 'r'}",
            "--data.name=synthetic"]  # fmt: skip
    mine = [*base, f"--checkpoint={encoder}"]

    def backbone(name: str, *flags: str) -> list[str]:
        return [*base, f"--model.backbone={name}", "--model.encoder_num_heads=null", *flags]

    two = "--curriculum={preset: custom, stages: [{bandwidth: 32}, {bandwidth: 64}]}"
    for sentence, arguments in {
        "encoder_num_heads 3 does not divide the width 32": [*mine, "--model.encoder_num_heads=3"],
        "image_size 32 x 60 is not a multiple": [*mine, "--model.image_size=[32, 60]"],
        "model.image_size must be positive": [*mine, "--model.image_size=[0, 64]"],
        "model.image_size must be": [*mine, "--model.image_size=[64, 64, 64]"],
        "micro-batches of even size": [*mine, "--recipe.mixup=1", "--efficiency.micro_batch=1"],
        "model.drop_path needs a trained network": [
            *mine, "--model.probe=linear", "--model.drop_path=0.1",
        ],
        "model.patch_size must be positive": [*mine, "--model.patch_size=-8"],
        "output.evaluate_every must be": [*mine, "--output.evaluate_every=often"],
        "batch norm needs micro-batches": [*base, *RESNET, "--efficiency.micro_batch=1"],
        "this network does not support it": backbone(
            "dla46_c", "--efficiency.gradient_checkpointing=true"
        ),
        "does not accept the curriculum's images of 32 pixels": backbone("halonet26t"),
        "the curriculum's images of 32 pixels (":  # found while FLOPs are counted
            backbone("halonet26t", "--curriculum.cost=flops"),
        "32 pixels; with --curriculum.preset constant all have 64 (Input height":
            backbone("test_vit_relpos", "--model.image_size=64", two),
        "model.drop_path: timm's densenet121 has none":
            backbone("densenet121", "--model.drop_path=0.1"),
        "batch_size must be positive": ["evaluate", f"--checkpoint={encoder}", "--batch_size=0"],
        "recipe.mixup must not be negative, got inf": [*mine, "--recipe.mixup=.inf"],
        "recipe.erasing must lie": [*mine, "--recipe.erasing=1"],
        "optim.layer_decay must lie": [*mine, "--optim.layer_decay=0"],
        "efficiency.sharding is for pre-training": [*mine, "--efficiency.sharding=full"],
        "is not a classifier": ["evaluate", f"--checkpoint={encoder}", "--data.name=synthetic"],
    }.items():  # fmt: skip
        assert main(arguments) == 2, sentence
        *notices, error = error_of(capsys.readouterr().err).splitlines()
        known = ("no statistics", "held out", "published recipes")
        assert all(any(part in line for part in known) for line in notices), notices
        assert sentence in error, error


def test_a_validation_split_that_lacks_a_class_is_refused(small, tmp_path) -> None:
    """Trained without looking at it, the run is refused by it when it is evaluated."""
    for split, classes in (("train", "abc"), ("val", "ab")):
        for number in range(8 * len(classes)):
            save(tmp_path / "lacks" / split / classes[number % len(classes)] / f"{number}.png")
    flags = [f"--data.root={tmp_path / 'lacks'}", "--curriculum.epochs=1"]
    with pytest.raises(UserError, match=r"the validation split has no image of c: add some"):
        classify(small(*flags))
    config = small(*flags, "--output.evaluate_every=null")
    classify(config)
    with pytest.raises(UserError, match=r"the validation split has no image of c$"):
        evaluate(EvaluateConfig(config.output.dir, device="cpu", num_workers=0))


def test_a_finished_run_is_not_retrained_and_a_changed_recipe_is_refused(small) -> None:
    results = classify(small())
    assert classify(small()) == results
    with pytest.raises(UserError, match=r"recipe\.mixup was 0\.0 and is now 0\.5"):
        classify(small("--recipe.mixup=0.5"))
    json.dumps(results)


def test_a_classifier_s_branch_continues_it_bit_for_bit(small, encoder: Path) -> None:
    """Without its initial weights; another learning rate takes effect, and its scores are kept."""
    config = small(*RECIPE, "--output.keep_every=5")
    classify(config)
    folder = config.output.dir
    encoder.unlink()
    start = ["--branch-from", str(folder / "checkpoints" / "step-00000005.pt")]
    weights = {}
    for name, changed in (("same", []), ("other", ["--optim.base_lr=0.01"])):
        new = folder.with_name(name)
        classify(config_of("finetune", [*start, f"--output.dir={new}", *changed]))
        weights[name] = (new / "model.safetensors").read_bytes()
        for record in (METRICS, SCORES):
            rows = [[row["step"] for row in read_metrics(each, record)] for each in (folder, new)]
            assert rows[0] == rows[1]
    assert weights["same"] == (folder / "model.safetensors").read_bytes()
    assert weights["other"] != weights["same"]
    flags = [*start, f"--output.dir={folder}-lars", "--optim.optimizer=lars"]
    with pytest.raises(UserError, match=r"optimizer was .* because the optimizer's state belongs"):
        classify(config_of("finetune", flags))
