"""Probes during pre-training: what they measure, and that they change nothing else."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from steps import train_with
from tiny_run import config_in

from finetune import ProbeConfig, score_encoder
from mae_et import Curriculum, pretrain
from mae_et.config.data import DataConfig
from mae_et.config.probe import OnlineProbeConfig, ProbeDataConfig
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.flops import training_flops
from mae_et.data.datasets import open_dataset
from mae_et.data.probe_images import open_probe_images
from mae_et.data.sources.synthetic import render
from mae_et.io.metrics_file import SCORES, read_metrics, row_line
from mae_et.models.mae import MaskedAutoencoder
from mae_et.monitoring.figures import results_table, standard_error
from mae_et.monitoring.summaries import MEASURES, PROBED_IMAGES
from mae_et.monitoring.terminal import Terminal
from mae_et.training import online_probe
from mae_et.training.online_probe import affordable_images, measure
from mae_et.training.step import train_step

# Of all images: three probes of 36, at a cost that the run can afford.
PLAIN = (
    "--data.synthetic_train=24", "--data.synthetic_val=12", "--data.eval_crop=0.8",
    "--data.mean=[0.3]", "--data.std=[0.4]", "--model.mask_ratio=0.5",
    "--output.tensorboard=false",
)  # fmt: skip
PROBED = (*PLAIN, "--probe.every=9", "--probe.max_fraction=1")


def watched(config: PretrainConfig) -> Path:
    """Pre-train, and write down the generator and the mode of the model at each step."""
    facts = []

    def step(run, *rest):
        generator = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        facts.append([generator, run.state.model.training])
        return train_step(run, *rest)

    folder = train_with(step, config)
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return watched(config_in(tmp_path_factory.mktemp("probed"), *PROBED))


def curve(folder: Path) -> list[tuple]:
    return [(row["step"], *(row[key] for key in MEASURES)) for row in read_metrics(folder, SCORES)]


def losses(folder: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(folder)]


def test_training_is_bit_for_bit_that_without_probes(run: Path, tmp_path: Path) -> None:
    plain = watched(config_in(tmp_path, *PLAIN))
    assert not (plain / SCORES).exists()
    assert losses(run) == losses(plain)
    for name in ("encoder.safetensors", "facts.json"):
        assert (run / name).read_bytes() == (plain / name).read_bytes()


def test_curve_runs_from_the_untrained_encoder_to_the_trained_one(run: Path) -> None:
    rows = read_metrics(run, SCORES)
    assert [row["step"] for row in rows] == [0, 9, 16]
    results = json.loads((run / "results.json").read_text())
    assert [(p["step"], *(p[key] for key in MEASURES)) for p in results["probes"]] == curve(run)
    assert (results["probes"][0]["compute"], results["probes"][-1]["compute"]) == (0, 1)
    seconds = sum(row["probe_seconds"] for row in rows)
    share = seconds / (seconds + results["training_seconds"])
    assert results["probe_time_fraction"] == pytest.approx(share)
    counts = [tuple(row[key] for key in PROBED_IMAGES) for row in rows]
    assert {*counts} == {tuple(results[f"probe_{key}"] for key in PROBED_IMAGES)}
    assert all(count > 1 for count in counts[0])


def test_accuracies_are_shown_with_their_standard_error(capsys) -> None:
    """Of 100 images, 20 % are classified correctly: p = 22 / 104, sqrt(p (1 - p) / 104) = 4."""
    assert standard_error(20.0, 100) == pytest.approx(4.0, abs=0.01)
    assert standard_error(0.0, 1) == pytest.approx(21.9, abs=0.1)
    assert standard_error(100.0, 10**6) == pytest.approx(0.0, abs=1e-3)
    plan = Curriculum.preset("etpp", 32, 8).plan(20, 64, 8)
    scores = {"knn": 20.0, "effective_rank": 3.5, "train_images": 50, "val_images": 100}
    Terminal(plan, 0).show_scores(1, scores)
    assert (
        "| kNN 20 ± 4 % | effective rank 3.5 | validation images 100\n" in capsys.readouterr().err
    )
    shown = results_table({"probe_knn": 20.0, "probe_val_images": 100}).splitlines()
    assert [line.split("  ")[0] for line in shown] == [
        "kNN of the last probe", "validation images of the last probe",
    ]  # fmt: skip
    assert [line.split("  ")[-1] for line in shown] == ["20 ± 4 %", "100"]
    assert results_table({"top1": 20.0, "val_images": 100}).startswith(
        "top-1              20 ± 4 %"
    )


def test_interrupted_runs_repeat_no_probe_and_miss_none(
    run: Path, tmp_path: Path, monkeypatch
) -> None:
    config, fractions = config_in(tmp_path, *PROBED), []

    def affordable(plan, mask_ratio: float, fraction: float) -> int:
        fractions.append(fraction)
        return affordable_images(plan, mask_ratio, fraction)

    monkeypatch.setattr(online_probe, "affordable_images", affordable)
    pretrain(config, stop_after_step=9)
    record = config.output.dir / SCORES
    # As if killed between the checkpoint of step 9 and the probe that was due with it.
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))
    pretrain(config, stop_after_step=11)
    with record.open("a") as file:  # as if killed at step 13, before its checkpoint
        file.write(row_line({"step": 13, "time": 0.0, "knn": 99.0}, SCORES))
    pretrain(config)
    assert curve(config.output.dir) == curve(run)
    assert fractions == [1 / 3] * 3


def test_knn_equals_that_of_the_knn_command(run: Path) -> None:
    config = ProbeConfig(run, device="cpu", num_workers=0)
    found = read_metrics(run, SCORES)[-1]["knn"]
    assert round(found, 2) == score_encoder(config, linear=False)["knn"]


def test_unlabelled_images_have_an_effective_rank(tmp_path: Path, capsys) -> None:
    """An image that cannot be read ends no run."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(30):
        Image.fromarray(render(number, 32)[0]).save(root / f"{number:02d}.png")
    (root / "07.png").write_bytes(b"")
    flags = [f"--data.root={root}", "--data.max_bad_fraction=0.5", "--curriculum.epochs=3"]
    folder = pretrain(config_in(tmp_path, *PROBED, *flags))
    rows = read_metrics(folder, SCORES)
    assert [set(row) for row in rows] == [
        {"step", "time", "effective_rank", "probe_seconds", *PROBED_IMAGES}
    ] * len(rows)
    assert all(1 < row["effective_rank"] < 29 for row in rows)
    assert {(row["train_images"], row["val_images"]) for row in rows} == {(23, 0)}
    said = capsys.readouterr().err
    assert "effective rank of 24 images, no accuracy: no classes" in said
    assert said.count("probe: 1 of 24 training images unreadable, skipped") == 1


def test_probes_that_are_set_up_and_never_due_are_reported(tmp_path: Path, capsys) -> None:
    pretrain(config_in(tmp_path, *PLAIN, "--probe.train_images=5"), stop_after_step=1)
    assert "keys of probe have no effect without probe.every" in capsys.readouterr().err


def labelled(root: Path, splits: tuple[str, ...], count: int = 20) -> None:
    for split in splits:
        for number in range(count):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(render(number, 32)[0]).save(folder / f"{number:02d}.png")


def test_another_data_set_is_prepared_as_the_run_s(tmp_path: Path) -> None:
    labelled(tmp_path / "other", ("a", "b"))
    given = ProbeDataConfig(root=tmp_path / "other", train_split="a", val_split="b")
    run = DataConfig(mean=(0.2,), std=(0.3,), eval_crop=0.7, synthetic_train=40)
    source = open_dataset(run, "train")
    images = open_probe_images(OnlineProbeConfig(data=given), run, source, 3, 1000, 0)
    assert (images.data.mean, images.data.std, images.data.eval_crop) == ((0.2,), (0.3,), 0.7)
    assert list(images.train.classes) == ["class0", "class1"]
    assert len(images.train_indices) == len(images.val_indices) == 20


def test_without_a_validation_split_training_images_are_held_out(tmp_path: Path, capsys) -> None:
    """Each image votes or is classified, none does both."""
    labelled(tmp_path, ("train",))
    data = DataConfig(root=tmp_path)
    source = open_dataset(data, "train")
    images = open_probe_images(OnlineProbeConfig(), data, source, 3, 1000, 0)
    assert images.val is source
    assert sorted(images.train_indices + images.val_indices) == list(range(20))
    assert len(images.val_indices) == 4
    assert "held out from the training images" in capsys.readouterr().err


def test_sample_shrinks_in_proportion_to_what_the_run_can_afford(capsys) -> None:
    """A line says what it takes for accuracies to mean something."""
    data = DataConfig(synthetic_train=4000, synthetic_val=1000)
    source = open_dataset(data, "train")
    images = open_probe_images(OnlineProbeConfig(), data, source, 3, 750, 0)
    assert (len(images.train_indices), len(images.val_indices)) == (600, 150)
    error = "0.02 allows no more; standard error 4 points, set it to 0.03 to classify 200)"
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(("train", "val", "used"), [(240, 60, (240, 60)), (4000, 900, (400, 100))])
def test_a_short_run_s_probe_uses_a_small_set_whole_and_some_hundreds_of_a_large_one(
    train: int, val: int, used: tuple[int, int], capsys
) -> None:
    data = DataConfig(synthetic_train=train, synthetic_val=val)
    source = open_dataset(data, "train")
    images = open_probe_images(OnlineProbeConfig(), data, source, 3, 3, 0)
    assert (len(images.train_indices), len(images.val_indices)) == used
    assert "(the fewest: more than probe.max_fraction 0.02 allows" in capsys.readouterr().err


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
def test_probes_cost_at_most_their_fraction_of_the_run_s_compute(mask_ratio: float) -> None:
    with torch.device("meta"):
        model = MaskedAutoencoder(
            "vit_tiny_patch16_224", encoder_depth=4, decoder_embed_dim=64, decoder_depth=1,
            decoder_num_heads=2,
        )  # fmt: skip
    cost = training_flops(lambda images: model(images, mask_ratio))
    plan = Curriculum.preset("etpp", 224, 16).plan(100, 10_000, 64, cost)
    images = affordable_images(plan, mask_ratio, 0.02)
    encoding = training_flops(model.encode)(224) / 3
    assert 0 < images * encoding <= 0.02 * plan.compute
    assert images <= 0.02 * plan.images


def test_non_finite_features_are_recorded_as_such() -> None:
    features = torch.full((4, 3), torch.nan), torch.tensor([0, 1, 0, 1])
    finite = torch.eye(4), features[1]
    for train, val in ((features, finite), (finite, features)):
        assert measure(train, val) == dict.fromkeys(MEASURES)


def test_measures_use_no_tf32(monkeypatch) -> None:
    used = []
    monkeypatch.setattr(
        online_probe, "knn_accuracy", lambda *_: used.append(torch.get_float32_matmul_precision())
    )
    features = torch.eye(4), torch.tensor([0, 1, 0, 1])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        measure(features, features)
        assert used == ["highest"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_sharded_model_is_probed_without_its_decoder(run: Path, tmp_path: Path, monkeypatch):
    """The decoder of the gathered copy never reaches the device; scores are the same."""
    moved = []

    def gather(run):
        gathered = copy.deepcopy(run.state.model)

        def to(device):
            moved.append(gathered.decoder)
            return gathered

        gathered.to = to
        return gathered

    monkeypatch.setattr(online_probe, "gather_model", gather)
    probe = online_probe.OnlineProbe.do

    def as_if_sharded(self, logger):
        assert self.run.state.model.decoder is not None
        monkeypatch.setattr(self.run.state, "sharded", True)
        probe(self, logger)
        monkeypatch.setattr(self.run.state, "sharded", False)

    monkeypatch.setattr(online_probe.OnlineProbe, "do", as_if_sharded)
    assert curve(pretrain(config_in(tmp_path, *PROBED))) == curve(run)
    assert moved == [None, None, None]
