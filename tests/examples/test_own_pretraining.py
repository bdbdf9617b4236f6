import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from natural_images import natural
from tiny_run import TINY

import finetune
import mae_et
from mae_et.cli.commands import COMMANDS
from mae_et.io.metrics_file import read_metrics

SCRIPT = Path(__file__).parents[2] / "examples" / "own_pretraining.py"


@pytest.fixture
def example() -> dict:
    return runpy.run_path(str(SCRIPT))


def test_own_images_and_targets_train_resume_and_keep_a_run_folder(
    tmp_path: Path, example: dict
) -> None:
    np.save(tmp_path / "mine.npy", np.stack([natural(40, 40, seed) for seed in range(40)]))
    (tmp_path / "tiny.yaml").write_text(TINY)
    recipe = str(tmp_path / "tiny.yaml")
    run = example["main"](tmp_path / "mine.npy", tmp_path / "run", recipe)
    losses = [row["loss"] for row in read_metrics(run)]
    assert losses[-1] < losses[0]
    assert "name: mine" in (run / "config.yaml").read_text()
    knn = COMMANDS["knn"]
    scored = knn.parse(knn, [str(run), f"--data.root={tmp_path}"]).data
    assert (scored.source, scored.root) == ("folder", tmp_path)
    with pytest.raises(mae_et.UserError, match=r"'mine' is unknown; .* give --data\.root FOLDER"):
        finetune.knn(finetune.ProbeConfig(run))

    task_of = example["EdgePretraining"]
    task_of.dataset = example["Photographs"](tmp_path / "mine.npy")
    flags = [f"--output.dir={tmp_path / 'parts'}", "--data.name=mine"]
    config = mae_et.load_config(mae_et.PretrainConfig, recipe, flags)
    mae_et.train_run(task_of(config), stop_after_step=11)
    mae_et.train_run(task_of(config))
    encoders = [(each / "encoder.safetensors").read_bytes() for each in (run, tmp_path / "parts")]
    assert encoders[0] == encoders[1]

    task_of.model = mae_et.MaskedAutoencoder
    plain = example["main"](tmp_path / "mine.npy", tmp_path / "plain", recipe)
    assert read_metrics(plain)[0]["loss"] != losses[0]  # the target alone differs


def test_the_target_is_what_a_blur_removes(example: dict) -> None:
    settings = mae_et.ModelConfig("vit_tiny_patch16_224", 32, 8, target="pixel")
    model = example["EdgeAutoencoder"].from_config(settings)
    flat = torch.full((1, 3, 32, 32), 0.5)
    assert model.targets(flat).abs().max() < 1e-6
    dot = flat.clone()
    dot[..., 16, 16] = 1.0
    assert model.targets(dot).max() > 0.3


def test_a_dataset_of_bare_images_or_with_a_mistake_is_refused_at_the_start(
    tmp_path: Path, example: dict
) -> None:
    """Not as unreadable images."""

    class Bare(example["Photographs"]):  # type: ignore[misc]
        def __getitem__(self, index: int) -> object:
            return super().__getitem__(index)[0]

    class Mistaken(Bare):
        def __getitem__(self, index: int) -> object:
            return self.files[index]

    np.save(tmp_path / "mine.npy", np.zeros((40, 32, 32, 3), np.uint8))
    (tmp_path / "tiny.yaml").write_text(TINY)
    flags = [f"--output.dir={tmp_path / 'run'}", "--data.name=mine"]
    config = mae_et.load_config(mae_et.PretrainConfig, str(tmp_path / "tiny.yaml"), flags)
    task = example["EdgePretraining"](config)
    task.dataset = Bare(tmp_path / "mine.npy")
    with pytest.raises(
        mae_et.UserError, match=r"gives \(image, label\), .* the first gave a Image: return"
    ):
        mae_et.train_run(task)
    task.dataset = Mistaken(tmp_path / "mine.npy")
    with pytest.raises(AttributeError, match="files"):
        mae_et.train_run(task)
