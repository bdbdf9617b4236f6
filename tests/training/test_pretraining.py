"""The loop, on a model that trains in a second."""

import json
import math
import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from steps import signal_at, train_with, wait_for_checkpoint
from tiny_run import GOLDEN, IMAGES

from mae_et import Interrupted, UserError, pretrain
from mae_et.checkpoints.store import list_checkpoints, newest_checkpoint
from mae_et.curriculum.plan import Plan
from mae_et.data.sources import synthetic
from mae_et.io.metrics_file import read_metrics
from mae_et.training.reconstructions import PeriodicReconstructions


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def test_a_run_writes_every_promised_file(tiny, trained) -> None:
    folder = trained
    results = json.loads((folder / "results.json").read_text())
    plan = json.loads((folder / "plan.json").read_text())
    rows = read_metrics(folder)
    assert {"config.yaml", "metrics.jsonl", "encoder.safetensors"} <= {
        p.name for p in folder.iterdir()
    }
    assert list(folder.glob("events.out.tfevents.*"))
    images = sorted(path.stem for path in (folder / "reconstructions").iterdir())
    assert images == ["step-00000012", "step-00000025"]
    assert len(list_checkpoints(folder / "checkpoints")) == tiny().output.keep_last
    assert rows[-1]["step"] == results["steps"] == newest_checkpoint(folder / "checkpoints")["step"]
    assert sum(row["window_steps"] for row in rows) == results["steps"]
    assert rows[-1]["compute"] == 1
    assert [s["bandwidth"] for s in results["stages"]] == [16, 24, 32]
    assert sum(s["images"] for s in results["stages"]) == results["images"]
    assert len(plan["stages"]) == 3
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    encoder = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=32, depth=2,
        num_heads=2,
    )  # fmt: skip
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"), strict=True)


def test_a_row_belongs_to_one_stage_and_counts_its_steps(trained) -> None:
    plan = Plan.from_dict(json.loads((trained / "plan.json").read_text()))
    for row in read_metrics(trained):
        first, last = row["step"] - row["window_steps"], row["step"] - 1
        assert plan.at(first) == plan.at(last)
        assert row["bandwidth"] == plan.at(last).bandwidth
        assert row["compute"] == pytest.approx(plan.progress(row["step"]))
        assert row["epoch"] == pytest.approx(row["step"] * 12 / 40)


def test_golden_losses_do_not_move(tiny) -> None:
    """A change that should not alter numbers keeps these (CONTRIBUTING, proof of value)."""
    golden = json.loads((GOLDEN / "losses.json").read_text())
    found = losses(pretrain(tiny("--output.log_every=1", "--seed=1")))
    assert len(found) == len(golden) >= 20
    assert found == pytest.approx(golden, rel=2e-5)


def test_training_lowers_the_loss(tiny) -> None:
    """Far below 1, which predicting each patch's mean gives for norm_pix."""
    found = losses(pretrain(tiny("--curriculum.epochs=10", "--data.scale=[1.0,1.0]")))
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--efficiency.micro_batch={16: 12, 24: 6, 32: 4}"],
        ["--efficiency.gradient_checkpointing=true", "--efficiency.num_workers=2", IMAGES,
         "--output.log_every=1", "--output.checkpoint_every=3", "--output.tensorboard=false"],
    ],
)  # fmt: skip
def test_efficiency_and_output_do_not_change_the_weights_beyond_rounding(
    tiny, trained, flags
) -> None:
    expected = newest_checkpoint(trained / "checkpoints")
    found = newest_checkpoint(pretrain(tiny(*flags)) / "checkpoints")
    exact = "micro_batch" not in flags[0]
    for name, weight in expected["model"].items():
        torch.testing.assert_close(
            found["model"][name], weight, rtol=0 if exact else 1e-4, atol=0 if exact else 2e-4
        )


@pytest.mark.parametrize(("target", "precision"), [("norm_pix", "fp16"), ("hog", "bf16")])
def test_half_precision_trains_to_about_the_same_loss(
    tiny, trained, target: str, precision: str
) -> None:
    def train(precision: str) -> list[float]:
        flags = [f"--model.target={target}", f"--efficiency.precision={precision}"]
        return losses(pretrain(tiny(*flags, f"--output.dir={tiny().output.dir}-{precision}")))

    full = losses(trained) if target == "norm_pix" else train("fp32")
    half = train(precision)
    assert half == pytest.approx(full, rel=0.03)
    assert half != full


def test_the_resize_method_trains_on_other_pixels(tiny, trained) -> None:
    fourier = losses(trained)
    resized = losses(pretrain(tiny("--crop.method=resize")))
    assert resized != fourier
    assert resized == pytest.approx(fourier, rel=0.2)


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(tiny, trained, monkeypatch) -> None:
    seen = []
    step = torch.optim.AdamW.step

    def watching(optimizer, *arguments):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watching)
    folder = pretrain(tiny("--optim.clip_grad=0.05", "--output.log_every=1"))
    rows = read_metrics(folder)
    assert len(seen) == len(rows)
    assert all(row["grad_norm"] > 0.05 for row in rows)  # as it was before
    assert seen == pytest.approx([0.05] * len(rows), rel=1e-3)
    assert losses(folder)[-1] != losses(trained)[-1]


def test_keep_every_keeps_checkpoints_at_its_multiples(tiny) -> None:
    """Also where none would have been due: 4 and 7 meet at no step before 28."""
    config = tiny("--output.checkpoint_every=4", "--output.keep_every=7", "--output.keep_last=1")
    names = [p.name[-6:-3] for p in list_checkpoints(pretrain(config) / "checkpoints")]
    assert names == ["007", "014", "021", "025"]


def test_a_run_may_resume_in_another_precision(tiny) -> None:
    """From bf16, which has no scaler, to fp16, which has one, and on in float32."""
    for precision, stop in (("bf16", 6), ("fp16", 12), ("fp32", None)):
        config = tiny(f"--efficiency.precision={precision}", "--output.checkpoint_every=6")
        if stop is None:
            assert (pretrain(config) / "results.json").exists()
            return
        with pytest.raises(Interrupted):
            train_with(signal_at(stop - 1, signal.SIGUSR2), config)


@pytest.mark.parametrize("failure", ["unreadable", "interrupted"])
def test_loader_processes_end_with_a_failed_run(tiny, monkeypatch, failure: str) -> None:
    """Held by the error's frames it would wait for work, and Python at its exit for it."""
    config = tiny("--efficiency.num_workers=2", "--curriculum.epochs=40")
    if failure == "unreadable":
        monkeypatch.setattr(synthetic, "render", lambda *_: 1 / 0)
    error: type[BaseException] = Interrupted if failure == "interrupted" else Exception
    with pytest.raises(error) as caught:
        train_with(signal_at(3), config)
    assert multiprocessing.active_children() == []
    assert caught.tb is not None  # the frames are still there


def test_restarting_a_finished_run_returns_its_results(tiny, trained) -> None:
    folder = Path(shutil.copytree(trained, tiny().output.dir))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert pretrain(tiny()) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_a_folder_of_a_run_with_other_settings_is_refused(tiny, finished, tmp_path: Path) -> None:
    finished.rename(tmp_path / "run")
    for flag, key in {
        "--optim.base_lr=0.5": "optim.base_lr was 0.02 and is now 0.5",
        "--model.encoder_depth=3": "model.encoder_depth",
        "--seed=9": "seed was 0 and is now 9",
        "--curriculum.epochs=9": "curriculum.epochs",
        "--crop.method=resize": "crop.method",
    }.items():
        with pytest.raises(UserError, match="holds a checkpoint of another run") as caught:
            pretrain(tiny(flag))
        assert key in str(caught.value)


@pytest.mark.parametrize("lost", ["checkpoints", "results.json"])
def test_a_run_that_lost_files_is_refused_under_other_settings_too(
    tiny, finished, tmp_path: Path, lost: str
) -> None:
    folder = finished.rename(tmp_path / "run")
    (folder / lost).rename(folder / f"{lost}-away")
    with pytest.raises(UserError, match="holds a checkpoint of another run: seed was 0 and is now"):
        pretrain(tiny("--seed=9"))


def test_reconstructions_follow_the_checkpoint_and_wait_for_the_resume_after_a_signal(
    tiny, trained, monkeypatch
) -> None:
    """A signal may leave no time to draw; the resumed run draws what was due."""
    config = tiny(IMAGES, "--output.reconstruct_every=6", "--output.checkpoint_every=6")
    draw = PeriodicReconstructions.do
    checkpoints, drawn = config.output.dir / "checkpoints", []

    def watched(self, logger):
        wait_for_checkpoint(self.run)
        assert newest_checkpoint(checkpoints)["step"] == self.run.state.step
        drawn.append(self.run.state.step)
        draw(self, logger)

    monkeypatch.setattr(PeriodicReconstructions, "do", watched)
    with pytest.raises(Interrupted):
        train_with(signal_at(17), config)
    assert drawn == [6, 12]
    pretrain(config)
    assert drawn == [6, 12, 18, 25]  # not 24, just before the last
    for path in (trained / "reconstructions").iterdir():
        again = config.output.dir / "reconstructions" / path.name
        assert again.read_bytes() == path.read_bytes()


def test_bad_batches_are_refused_before_anything_is_written(tiny) -> None:
    for flags, sentence in {
        ("--optim.batch_size=41",): "larger than the dataset of 40 images",
        ("--curriculum.epochs=0.01",): "less than one step",
    }.items():
        config = tiny(*flags)
        with pytest.raises(UserError, match=sentence):
            pretrain(config)
        assert not config.output.dir.exists()
