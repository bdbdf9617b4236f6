"""Newcomers' mistakes are found before they cost a day, and named with their remedy."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_files import save
from tiny_run import GOLDEN

from finetune import ProbeConfig
from finetune.probing.features import extract_dataset_features
from finetune.probing.frozen_encoder import frozen_encoder_of_model
from mae_et import MaskedAutoencoder, UserError, pretrain
from mae_et.cli.commands import config_of
from mae_et.cli.main import main
from mae_et.config.data import DataConfig
from mae_et.config.files import to_yaml

RUN = ["--config=tiny.yaml", "--output.dir=run"]


@pytest.fixture
def flat_val(place: Path) -> Path:
    """ImageNet as its archives unpack: only the training images lie in class folders."""
    for name in [*(f"train/{label}/{i}.png" for label in "ab" for i in range(20)), "val/9.png"]:
        save(place / "images" / name)
    return place / "images"


def refusal(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["slurm.py", "finetune/__init__.py"])
def test_a_file_named_like_our_package_is_refused_and_never_run(place: Path, name: str) -> None:
    file = place / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("print('hijacked')")

    def run(*start: str, **variables: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *start, "compare", "nowhere"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | variables
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert ended.returncode == 2
        assert "hijacked" not in ended.stdout
        return ended

    script = ["-c", "import sys, mae_et.__main__; sys.exit(mae_et.__main__.main())"]
    found_first = f"{place}{os.pathsep}{Path(__file__).parents[2]}"
    refusals = [run("-m", "mae_et"), run("-P", *script, PYTHONPATH=found_first)]
    assert all(f"{file} hides a package of mae-et" in refused.stderr for refused in refusals)
    safe = run("-m", "mae_et", PYTHONSAFEPATH="1")
    assert "there is no run folder nowhere" in safe.stderr


def test_validation_images_without_class_folders_are_found_before_pretraining(
    place: Path, flat_val: Path, capsys
) -> None:
    run = ["submit", "pretrain", *RUN, f"--data.root={flat_val}", "--dry-run"]
    said = refusal(capsys, *run, "--then=knn")
    assert f"the val split of data.root {flat_val} has no classes (9.png is in no" in said
    assert main(run) == 0  # pre-training alone reads no labels
    (flat_val / "val" / "9.png").rename(flat_val / "9.png")
    assert "has fewer than two class folders" in refusal(capsys, *run, "--then=knn")
    (flat_val / "val").rmdir()
    assert "has no val split" in refusal(capsys, *run, "--then=knn")
    for label in "ab":
        (flat_val / "val" / label).mkdir(parents=True)
    assert main([*run, "--then=knn"]) == 0
    (flat_val / "val").rename(flat_val / "Testing")
    assert main([*run, "--then=knn"]) == 0


def test_output_lies_nowhere_among_the_images(
    place: Path, flat_val: Path, monkeypatch, capsys
) -> None:
    run = ["pretrain", "--config=tiny.yaml"]
    for folder in ("images/train/run", "images/val"):
        for command in (run, ["submit", *run, "--dry-run"]):
            said = refusal(capsys, *command, "--data.root=images", f"--output.dir={folder}")
            assert "its images would become data" in said
    said = refusal(capsys, *run, "--data.root=images/train", "--output.dir=images/train/run")
    assert "lies in images/train: its" in said
    classify = ["supervised", "--model.backbone=resnet18", "--data.root=images/train"]
    assert "would become data" in refusal(capsys, *classify, "--output.dir=images/train/run")
    monkeypatch.chdir(flat_val)  # beside the split folders; plan writes nothing
    run[1] = f"--config={place / 'tiny.yaml'}"
    assert main(["submit", *run, "--data.root=.", "--output.dir=run", "--dry-run"]) == 0
    assert main(["plan", run[1], f"--data.root={flat_val / 'train'}"]) == 0


def test_scoring_names_the_split_that_has_no_classes_and_why(flat_val: Path, tiny) -> None:
    encoder = frozen_encoder_of_model(MaskedAutoencoder.from_config(tiny().model))
    config = ProbeConfig(flat_val, num_workers=0)
    with pytest.raises(UserError, match=r"val split of .*images has no classes.*val/CLASS"):
        extract_dataset_features(
            encoder, DataConfig(root=flat_val), config, "val", torch.device("cpu")
        )


def test_fine_tuning_inherits_the_data_of_its_checkpoint_or_requires_them(
    place, tiny, capsys
) -> None:
    run = pretrain(tiny("--data.synthetic_train=41"))
    capsys.readouterr()
    start = [f"--checkpoint={run}", "--model.image_size=32"]
    data = config_of("finetune", start).data
    assert (data.name, data.synthetic_train) == ("synthetic", 41)
    assert data.scale == (0.08, 1.0)  # the source is taken over, and not how it is shown
    assert config_of("finetune", [*start, "--data.synthetic_train=30"]).data.synthetic_train == 30
    assert config_of("finetune", [*start, f"--data.root={place}"]).data.source == "folder"
    golden = GOLDEN / "mae_tiny_released_format.pth"
    said = refusal(capsys, "finetune", f"--checkpoint={golden}")
    assert "data must be given (--data.root or --data.name)" in said


def test_fine_tuning_has_a_folder_of_its_own_for_each_start(place: Path, tiny, capsys) -> None:
    """In the folder of the run, where status and compare find it."""
    run = pretrain(tiny())
    small = ["--model.image_size=32", "--data.name=synthetic"]
    (place / "given.yaml").write_text("output: {dir: given}")
    for words, folder in (
        ([str(run)], run / "finetune"),
        ([str(run), "--config=finetune/vit_b16_linear"], run / "finetune-linear"),
        ([str(run), "--config=given.yaml"], Path("given")),
        ([str(run), "--output.dir=runs/finetune"], Path("runs/finetune")),
        ([str(GOLDEN / "mae_tiny_released_format.pth"), "--model.encoder_num_heads=2"],
         Path("runs/finetune-mae_tiny_released_format")),
    ):  # fmt: skip
        assert config_of("finetune", [*words, *small]).output.dir == folder


def test_batch_larger_than_the_default_synthetic_data_is_refused(place: Path, capsys) -> None:
    said = refusal(capsys, "plan", "--config=tiny.yaml", "--optim.batch_size=64")
    assert (
        "of 40 images (the synthetic one, because neither data.root nor data.name is given)" in said
    )
    flags = ["--data.name=synthetic", "--optim.batch_size=64"]
    assert "for want of" not in refusal(capsys, "plan", "--config=tiny.yaml", *flags)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pretrain", "--batch_size=8"], "did you mean --optim.batch_size?"),
        (["pretrain", "--optim.base_lrr=8"], "did you mean --optim.base_lr"),
        (["pretrain", "--blr=8"], "did you mean --optim.base_lr?"),  # MAE's name of it
        (["finetune", "--model-ema"], "did you mean --optim.ema?"),  # timm's
        (["pretrain", "--lr=8"], "did you mean --optim.base_lr or --optim.min_lr?"),
        (["knn", "--checkpoint=x", "--neighbors=8"], "did you mean --neighbours?"),
        (["knn", "x", "--epochs=3"], "--epochs is a key of mae-et linear-probe, not of mae-et knn"),
        (["linear-probe", "x", "--temperature", "1"], "--temperature is a key of mae-et knn, not"),
        (["pretrain", "--config=finetune/vit_b16"], "is a config of mae-et finetune, not of"),
        (["pretrain", "--config", "supervised/resnet50"], "is a config of mae-et supervised"),
        (["finetune", "--config=pretrain/vit_b16_etpp_400ep"], "is a config of mae-et pretrain"),
        (["finetune"], "give --checkpoint"),
        (["pretran"], "no command 'pretran'; did you mean pretrain?"),
        (["linear_probe"], "no command 'linear_probe'; did you mean linear-probe?"),
    ],
)
def test_unknown_flags_and_commands_suggest_the_closest(
    place: Path, capsys, arguments: list[str], sentence: str
) -> None:
    assert sentence in refusal(capsys, *arguments)


def test_a_run_folder_as_the_first_word_resumes_its_run(place: Path, capsys) -> None:
    config = config_of("pretrain", RUN)
    moved, empty = place / "moved", place / "empty"
    empty.mkdir()
    moved.mkdir()
    (moved / "config.yaml").write_text(to_yaml(config))
    resumed = config_of("pretrain", [str(moved), "--seed=3"])
    assert resumed == replace(config, output=replace(config.output, dir=moved), seed=3)
    assert "is a config of mae-et pretrain" in refusal(capsys, "supervised", str(moved))
    for command in ("pretrain", "preview"):
        assert f"{empty} is not a run folder" in refusal(capsys, command, str(empty))


def test_switches_need_no_value_and_runs_no_flag(place: Path, capsys) -> None:
    assert config_of("knn", ["--checkpoint=x", "--untrained"]).untrained
    assert config_of("knn", ["--untrained", "--checkpoint=x"]).untrained
    assert not config_of("knn", ["--checkpoint=x", "--untrained", "false"]).untrained
    assert config_of("pretrain", ["--efficiency.compile", "--seed=1"]).efficiency.compile
    for arguments in (["a", "b", "--output=t.md"], ["--output", "t.md", "a", "b"]):
        config = config_of("compare", arguments)
        assert (config.runs, config.output) == ([Path("a"), Path("b")], Path("t.md"))
    (place / "done").mkdir()
    (place / "done" / "metrics.jsonl").write_text("")
    (place / "done" / "results.json").write_text(json.dumps({"loss": 1.0}))
    capsys.readouterr()
    assert main(["status", "done", "--watch"]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["finetune", "--help"]) == 0
    assert "--checkpoint PATH" in capsys.readouterr().out
