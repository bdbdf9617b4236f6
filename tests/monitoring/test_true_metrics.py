"""Logged metrics equal a recomputation from what each step did.

A wrapper records the facts of each step while a run trains, is killed, is stopped by a signal, and
resumes. Afterwards metrics.jsonl and TensorBoard's files, read by TensorBoard's own reader, are
compared with these facts.
"""

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interruptions import ENDS, run_until
from oracles import mae_flops
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import IMAGES, config_in

from finetune import ClassifierConfig
from mae_et import load_config
from mae_et.config.schema import PretrainConfig
from mae_et.io.metrics_file import SCORES, read_metrics
from mae_et.models.mae import MaskedAutoencoder
from mae_et.monitoring.figures import FIGURES
from mae_et.monitoring.tensorboard import SCORE_TAGS, TAGS, USUALLY_ZERO
from mae_et.training.optim import lr_at, weight_decay_at

EVERYTHING = {"scalars": 0, "images": 0, "tensors": 0}
CLASSIFIER = """
model: {image_size: 32, encoder_num_heads: 2}
data: {synthetic_size: 32, synthetic_train: 40, synthetic_val: 20}
curriculum: {preset: custom, epochs: 4.5, cost: area,
             stages: [{bandwidth: 16, share: 1}, {bandwidth: 32, share: 2}]}
optim: {batch_size: 12}
efficiency: {num_workers: 0, device: cpu}
output: {log_every: 2, checkpoint_every: 5, evaluate_every: 4}
"""


def reader(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance=EVERYTHING)


@pytest.fixture(scope="module", params=["whole", "interrupted"])
def recorded(request, tmp_path_factory) -> tuple[PretrainConfig, list[dict], EventAccumulator]:
    """A pre-training run, the facts of its steps, and a TensorBoard reader that stays open."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["--optim.weight_decay_end=0.2", "--probe.every=6", "--probe.max_fraction=1"]
    config = config_in(folder, IMAGES, *flags)
    return config, *trained(config, folder, ENDS if request.param == "interrupted" else ())


def trained(config: Any, folder: Path, ends: tuple) -> tuple[list[dict], EventAccumulator]:
    notes, live = folder / "steps.jsonl", None
    for end in (*ends, None):
        run_until(config, notes, end)
        newest = max(path.name for path in config.output.dir.glob("events.out.tfevents.*"))
        while int(time.time()) <= int(newest.split(".")[3]):  # files are ordered by that second
            time.sleep(0.01)
        live = live or reader(config.output.dir)
        live.Reload()
    facts: dict[int, dict] = {}
    for line in notes.read_text().splitlines():
        fact = json.loads(line)
        # A repeated step is the same step.
        assert facts.setdefault(fact["step"], fact) == fact
    assert sorted(facts) == list(range(len(facts)))
    return [facts[step] for step in range(len(facts))], live


def windows(rows: list[dict], facts: list[dict]) -> list[list[dict]]:
    """Return the facts of each row's steps, which must be contiguous and disjoint."""
    edges = [0, *(row["step"] for row in rows)]
    assert [row["window_steps"] for row in rows] == [
        end - start for start, end in itertools.pairwise(edges)
    ]
    assert edges[-1] == len(facts)
    return [facts[start:end] for start, end in itertools.pairwise(edges)]


def test_metrics_equal_a_recomputation_from_the_steps(recorded) -> None:
    config, facts, _ = recorded
    folder, model, batch, dataset = config.output.dir, config.model, 12, 40
    cost = {b: mae_flops(b, *hand(model)) for b in (16, 24, 32)}
    done = [0.0]  # FLOPs before each step, added up one step at a time
    for fact in facts:
        done.append(done[-1] + batch * cost[fact["bandwidth"]])
    rows = read_metrics(folder)
    seconds = 0.0
    for row, steps in zip(rows, windows(rows, facts), strict=True):
        last = row["step"] - 1
        seconds += row["window_seconds"]
        progress = done[last] / done[-1]
        expected = {
            "bandwidth": facts[last]["bandwidth"],
            "loss": math.fsum(step["loss"] for step in steps) / len(steps),
            "grad_norm": facts[last]["norm"],
            "lr": facts[last]["lr"],
            "weight_decay": facts[last]["weight_decay"],
            "epoch": row["step"] * batch / dataset,
            "compute": done[row["step"]] / done[-1],
            "equivalent_epochs": done[row["step"]] / (cost[32] * dataset),
            "seconds": seconds,
            "images_per_second": len(steps) * batch / row["window_seconds"],
        }
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-6, abs=1e-12), key
        assert row["lr"] == pytest.approx(lr_at(progress, config.optim), rel=1e-9, abs=1e-15)
        decay = weight_decay_at(progress, config.optim)
        assert row["weight_decay"] == pytest.approx(decay, rel=1e-9)
        assert 0 <= row["data_time_fraction"] <= 1
        assert 0.05 < row["memory_gib"] < 100  # of this process
        assert {step["bandwidth"] for step in steps} == {row["bandwidth"]}
    results = json.loads((folder / "results.json").read_text())
    assert results["images"] == len(facts) * batch == sum(r["window_steps"] for r in rows) * batch
    assert results["compute"] == pytest.approx(done[-1], rel=1e-9)
    assert results["training_seconds"] == pytest.approx(seconds)
    assert results["loss"] == rows[-1]["loss"]
    for stage in results["stages"]:
        images = batch * sum(fact["bandwidth"] == stage["bandwidth"] for fact in facts)
        assert stage["images"] == images
        assert stage["compute"] == pytest.approx(images * cost[stage["bandwidth"]], rel=1e-9)


def hand(model: Any) -> tuple[int, ...]:
    return (
        model.patch_size, model.encoder_embed_dim, model.encoder_depth,
        model.decoder_embed_dim, model.decoder_depth,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["opened at the end", "open throughout"])
def test_tensorboard_shows_every_row_exactly_once(recorded, kind: str) -> None:
    config, facts, live = recorded
    folder = config.output.dir
    found = live if kind == "open throughout" else reader(folder).Reload()
    scores = read_metrics(folder, SCORES)
    # None shortly before the last, at step 24 of 25.
    assert [row["step"] for row in scores] == [*range(0, len(facts) - 2, 6), len(facts)]
    check_scalars(found, read_metrics(folder), scores, folder)
    drawn = sorted(int(path.stem[-8:]) for path in (folder / "reconstructions").glob("*.png"))
    assert [image.step for image in found.Images("reconstructions")] == drawn
    files = [path.stat().st_size for path in folder.glob("events.out.tfevents.*")]
    assert sum(size > 0 for size in files) == 1
    assert len(files) <= 2, "an empty file for each start"


@pytest.mark.parametrize(
    "ends",
    [pytest.param((), id="whole"), pytest.param(ENDS, id="interrupted", marks=pytest.mark.slow)],
)
def test_tensorboard_shows_losses_and_accuracies_of_classifiers(tmp_path: Path, ends) -> None:
    (tmp_path / "small.yaml").write_text(CLASSIFIER)
    network = MaskedAutoencoder("vit_tiny_patch16_224", 32, 8, 3, 32, 1, 2, decoder_depth=0)
    save_file(dict(network.encoder.state_dict()), tmp_path / "encoder.safetensors")
    flags = [
        f"--output.dir={tmp_path}/run",
        f"--model.checkpoint={tmp_path}/encoder.safetensors",
    ]
    config = load_config(ClassifierConfig, [tmp_path / "small.yaml"], flags)
    facts, live = trained(config, tmp_path, ends)
    rows, scores = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "run", SCORES)
    for row, steps in zip(rows, windows(rows, facts), strict=True):
        mean = math.fsum(step["loss"] for step in steps) / len(steps)
        assert row["loss"] == pytest.approx(mean, rel=1e-6)
        assert row["lr"] == pytest.approx(steps[-1]["lr"])
        area = sum(fact["bandwidth"] ** 2 for fact in facts[: row["step"]])
        assert row["equivalent_epochs"] == pytest.approx(area * 12 / (32**2 * 40))
    assert [row["step"] for row in scores] == [*range(4, len(facts), 4), len(facts)]
    for found in (live, reader(tmp_path / "run").Reload()):
        check_scalars(found, rows, scores, tmp_path / "run")


def check_scalars(found: EventAccumulator, rows: list, scores: list, folder: Path) -> None:
    """Compare all curves of an event file with the rows: tags, steps, values, times."""

    def thousandths(row: dict) -> int:
        by_step = {each["step"]: each for each in rows}
        exact = by_step.get(row["step"], row).get("equivalent_epochs")
        return round(1000 * (epochs_at(row["step"], folder) if exact is None else exact))

    expected: dict[str, list[tuple[int, float, float | None]]] = {}

    def expect(tag: str, place: Callable[[dict], int], key: str, chosen: list[dict]) -> None:
        found = [row for row in chosen if row.get(key) is not None]
        points = [(place(row), row[key], row["time"]) for row in found]
        if points:
            expected.setdefault(tag, []).extend(points)

    def at(row: dict) -> int:
        return row["step"]

    for key, tag in TAGS.items():
        if key in USUALLY_ZERO:
            expect(tag, at, key, from_first_nonzero(rows, key))
        elif key != "magnitude":  # nothing is augmented
            expect(tag, at, key, rows)
    expect("vs_compute/loss", thousandths, "loss", rows)
    for row in rows:
        if row.get("spike"):
            expect("training/loss_spikes", at, "loss", [row])
        expect(f"stages/loss_{row['stage'] + 1}_B{row['bandwidth']}", at, "loss", [row])
    constant = {"step", "time", "train_images", "val_images", "top1_standard_error"}
    for key in set(scores[0]) - constant if scores else ():
        name = "validation_loss" if key == "val_loss" else key
        expect("loss/validation" if key == "val_loss" else tag_of(key), at, key, scores)
        if key == "probe_seconds":
            continue
        expect(f"vs_compute/{name}", thousandths, key, scores)
        expect(f"vs_images/{name}", lambda row: row["step"] * 12, key, scores)
    for key, value in json.loads((folder / "results.json").read_text()).items():
        if key in FIGURES:
            expected[f"results/{key}"] = [(rows[-1]["step"], float(value), None)]
    assert set(found.Tags()["scalars"]) == set(expected)
    for tag, points in expected.items():
        read = found.Scalars(tag)
        assert [scalar.step for scalar in read] == [step for step, _, _ in points], tag
        values = [value for _, value, _ in points]
        assert [scalar.value for scalar in read] == pytest.approx(values, rel=1e-6), tag
        if points[0][2] is not None:
            assert [scalar.wall_time for scalar in read] == [time for _, _, time in points], tag


def tag_of(score: str) -> str:
    return SCORE_TAGS.get(score, f"accuracy/{score}")


def from_first_nonzero(rows: list, key: str) -> list:
    first = next((place for place, row in enumerate(rows) if row[key]), len(rows))
    return rows[first:]


def epochs_at(step: int, folder: Path) -> float:
    """Return the equivalent epochs done after a step, stage by stage from plan.json."""
    plan = json.loads((folder / "plan.json").read_text())
    done = sum(
        stage["cost"] * min(max(step - stage["start"], 0), stage["steps"])
        for stage in plan["stages"]
    )
    return done * plan["batch_size"] / (plan["base_cost"] * plan["dataset_size"])
