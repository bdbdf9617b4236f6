"""Images of other shapes than a square: from the command line to scores, and back into files."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from classifiers import vit_of
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from tiny_run import GOLDEN

from finetune.config import ClassifierConfig, NetworkConfig
from finetune.image_size import size_at_bandwidth
from finetune.training.plan import image_cost
from mae_et import UserError
from mae_et.checkpoints.formats import load_weights
from mae_et.cli.main import main
from mae_et.config.data import DataConfig
from mae_et.config.schema import CurriculumConfig
from mae_et.curriculum.flops import training_flops
from mae_et.data.transforms import EvalDataset

TINY = GOLDEN / "mae_tiny_released_format.pth"
SETTINGS = """
model: {encoder_num_heads: 3}
data: {name: synthetic, synthetic_size: 64, synthetic_train: 40, synthetic_val: 30}
optim: {batch_size: 8, base_lr: 0.05, min_lr: 0.0, warmup_fraction: 0.2}
efficiency: {num_workers: 0, device: cpu}
output: {tensorboard: false}
"""


@pytest.fixture
def command(tmp_path: Path, capsys):
    """Return what runs a command on the small settings, and gives its results or its sentence."""
    (tmp_path / "settings.yaml").write_text(SETTINGS)

    def run(name: str, *flags: str) -> dict | str:
        trains = name in {"finetune", "supervised"}
        settings = [f"--config={tmp_path / 'settings.yaml'}"] if trains else []
        status = main([name, *settings, *flags])
        said = capsys.readouterr()
        assert status == (0 if said.out else 2)
        return json.loads(said.out.splitlines()[-1]) if said.out else said.err.strip()

    return run


@pytest.mark.parametrize("patch", [1, 8, 32])
@pytest.mark.parametrize("size", [224, (160, 224), (224, 160), (96, 384)])
def test_bandwidths_refer_to_the_shorter_side_and_keep_the_aspect_ratio(size, patch) -> None:
    full = np.array([size] * 2 if isinstance(size, int) else size)
    assert size_at_bandwidth(size, full.min(), patch) == tuple(full)
    for bandwidth in range(patch, full.min(), patch):
        sides = np.array(size_at_bandwidth(size, bandwidth, patch))
        assert sides.min() == bandwidth
        assert not (sides % patch).any()
        exact = full * bandwidth / full.min()
        assert ((exact <= sides) & (sides < exact + patch)).all()


@pytest.mark.parametrize(("height", "width"), [(32, 64), (32, 100), (50, 64)])
def test_an_evaluation_crop_covers_a_rectangle_and_is_its_centre(height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found, _ = EvalDataset([(image, 0)], DataConfig(eval_crop=1.0), (32, 64))[0]
    top, left = (height - 32) // 2, (width - 64) // 2
    expected = torch.from_numpy(pixels[top : top + 32, left : left + 64]).permute(2, 0, 1)
    assert torch.equal(found, expected)
    large = image.resize((3 * width, 3 * height))
    assert EvalDataset([(large, 0)], DataConfig(), (32, 64))[0][0].shape == (3, 32, 64)


def test_a_checkpoint_is_fine_tuned_scored_and_exported_at_a_rectangle(command, tmp_path) -> None:
    """Of 4 x 16 patches, which are as many as those of the square that it was pre-trained at."""
    run = tmp_path / "run"
    flags = [f"--checkpoint={TINY}", "--model.image_size=[32, 128]", f"--output.dir={run}"]
    budget = "--curriculum={preset: etpp, epochs: 4, cost: flops}"
    results = command("finetune", *flags, budget)
    assert [stage["bandwidth"] for stage in results["stages"]] == [16] * 2 + [24] * 4 + [32] * 4
    plan = json.loads((run / "plan.json").read_text())
    weights = load_weights(run)
    network = vit_of(weights.with_given(3), 10, (32, 128))
    # Positions are now those of the rectangle, in a run's folder, and stay as they were trained.
    assert torch.equal(network.pos_embed.detach(), weights.encoder["pos_embed"])
    taller = vit_of(weights.with_given(3), 10, (64, 128)).pos_embed.detach()
    assert torch.equal(
        taller, resample_abs_pos_embed(weights.encoder["pos_embed"], [8, 16], [4, 16])
    )
    flops = training_flops(network.to("meta").eval(), 3, lambda _: (32, 128))
    assert plan["base_cost"] == flops(32)
    scores = command("evaluate", f"--checkpoint={run}")
    assert (scores["top1"], scores["val_loss"]) == (results["top1"], results["val_loss"])
    path = tmp_path / "timm.safetensors"
    command("export", f"--checkpoint={run}", "--format=timm", f"--output={path}")
    assert torch.equal(load_file(path)["pos_embed"], weights.encoder["pos_embed"])


def test_a_backbone_is_trained_on_rectangles_under_a_curriculum(command, tmp_path) -> None:
    flags = ["--model={backbone: test_resnet, image_size: [32, 48], encoder_num_heads: null}"]
    flags += ["--curriculum={preset: etpp, epochs: 2, cost: area}", f"--output.dir={tmp_path}"]
    results = command("supervised", *flags)
    assert json.loads((tmp_path / "plan.json").read_text())["base_cost"] == 32 * 48
    costs = {s["bandwidth"]: s["compute"] / s["images"] for s in results["stages"]}
    assert costs == {14: 14 * 21, 23: 23 * 35, 32: 32 * 48}
    assert command("evaluate", f"--checkpoint={tmp_path}")["top1"] == results["top1"]


def test_positions_of_an_unrecorded_grid_are_used_unchanged_or_refused(tmp_path) -> None:
    """A file of weights does not record the grid of its positions."""
    network = vit_of(load_weights(TINY).with_given(3), 10, (32, 96))
    save_file(network.state_dict(), tmp_path / "tuned.safetensors")
    weights = load_weights(tmp_path / "tuned.safetensors")
    again = vit_of(weights.with_given(3), 10, (32, 96))
    assert torch.equal(again.pos_embed, network.pos_embed)
    with pytest.raises(UserError, match=r"has 48 positions, .* nor 8 x 8 patches"):
        vit_of(weights.with_given(3), 10, 64)


def test_area_costs_the_pixels_that_are_shown() -> None:
    config = ClassifierConfig(model=NetworkConfig(backbone="test_vit", image_size=(96, 128)))
    with torch.device("meta"):
        network = timm.create_model("test_vit")
    assert image_cost(config, network)(48) == 48 * 64


def test_flops_of_a_network_that_pools_by_attention_are_counted() -> None:
    """Its query is a parameter that is expanded, with a gradient and without a function of it."""
    curriculum = CurriculumConfig(preset="constant", cost="flops")
    config = ClassifierConfig(model=NetworkConfig(backbone="test_vit"), curriculum=curriculum)
    with torch.device("meta"):
        network = timm.create_model("vit_tiny_patch16_224", global_pool="map", depth=1)
    assert image_cost(config, network)(224) > 3 * 2 * 196 * 768 * 192
