"""Scores of frozen encoders, from run folders."""

import dataclasses
import errno
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune
import mae_et
from finetune import ProbeConfig, extract_dataset_features, score_encoder
from finetune.probing import probes
from finetune.probing.features import Features
from finetune.probing.frozen_encoder import open_encoder
from mae_et import UserError, load_pretrained
from mae_et.cli.main import main
from mae_et.curriculum.frequency import low_pass
from mae_et.data.datasets import open_dataset
from mae_et.data.evenly_spaced import drawn_evenly
from mae_et.data.sources.synthetic import Synthetic
from mae_et.data.transforms import EvalDataset, normalise
from mae_et.monitoring import progress
from mae_et.monitoring.figures import results_table, standard_error
from mae_et.monitoring.run_record import RunRecord

POOLED = "knn", "linear"


@pytest.fixture
def run(finished: Path) -> Path:
    return finished


def probe(run: Path, tiny, **settings) -> ProbeConfig:
    return ProbeConfig(run, data=tiny().data, num_workers=0, device="cpu", epochs=5, **settings)


@pytest.mark.parametrize(("pool", "bandwidth"), [("cls", None), ("mean", 8)])
def test_features_are_pooled_tokens_in_the_order_of_the_data(
    run, tiny, pool: str, bandwidth: int | None
) -> None:
    """Also of images behind a low-pass filter."""
    config = probe(run, tiny, pool=pool, batch_size=7)
    model = load_pretrained(run)
    data = tiny().data
    encoder = open_encoder(run)
    features = extract_dataset_features(
        encoder, data, config, "val", torch.device("cpu"), bandwidth=bandwidth
    )
    assert features.vectors.shape == (20, model.encoder.embed_dim)
    view = EvalDataset(open_dataset(data, "val"), data, 32)
    image, label = view[11]
    pixels = normalise(image[None], data.mean, data.std)
    if bandwidth is not None:
        pixels = low_pass(pixels, bandwidth)
    tokens = model.encoder.forward_features(pixels)[0]
    expected = tokens[0] if pool == "cls" else tokens[1:].mean(0)
    torch.testing.assert_close(features.vectors[11], expected.detach(), rtol=1e-4, atol=1e-5)
    assert features.labels[11] == label
    config = dataclasses.replace(config, precision="bf16")
    half = extract_dataset_features(encoder, data, config, "val", "cpu", bandwidth=bandwidth)
    assert 1e-4 < (half.vectors - features.vectors).abs().max() < 0.1


def test_untrained_scores_come_beside_the_trained_ones(run, tiny) -> None:
    results = score_encoder(probe(run, tiny, untrained=True))
    assert set(results) == {
        "data", "settings", "knn", "linear", "linear_learning_rate", "untrained_knn",
        "untrained_linear", "untrained_linear_learning_rate", "provenance",
        *(f"{fresh}{key}_standard_error" for fresh in ("", "untrained_") for key in POOLED),
    }  # fmt: skip
    assert results["knn_standard_error"] == round(standard_error(results["knn"], 20), 2)
    assert results.pop("data") == "synthetic"
    assert results.pop("settings") == f"epochs={probe(run, tiny).epochs}"  # the default is 100
    del results["provenance"]
    assert all(0 <= value <= 100 for value in results.values())
    json.dumps(results)
    assert finetune.knn(probe(run, tiny))["knn"] == results["knn"]
    assert finetune.linear_probe(probe(run, tiny))["linear"] == results["linear"]


def test_scores_record_what_they_were_computed_from(run, tiny, capsys) -> None:
    """Weights have one digest in every file; another size is named, and resamples positions."""
    results = finetune.knn(probe(run, tiny, pool="cls", image_size=48))
    said = "features: class token, images of 48 pixels"
    assert said in capsys.readouterr().err
    assert results["settings"] == "pool=cls,image_size=48"
    provenance = results["provenance"]
    weights = provenance.pop("weights")
    data = tiny().data
    assert provenance == {
        "version": mae_et.__version__, "checkpoint": str(run.resolve()), "image_size": [48, 48],
        "mean": list(data.mean), "std": list(data.std), "eval_crop": data.eval_crop,
        "max_value": None, "precision": "float32", "device": "cpu", "train_images": 40,
        "val_images": 20, "pool": "cls", "neighbours": 20, "temperature": 0.07, "seed": 0,
    }  # fmt: skip
    shown = results_table(results)
    assert "provenance  pool cls, image_size [48, 48], train_images 40, val_images 20" in shown
    assert len(shown.splitlines()) == 4
    other = finetune.linear_probe(
        dataclasses.replace(probe(run, tiny), checkpoint=run / "encoder.safetensors")
    )
    assert other["provenance"]["weights"] == weights
    assert other["provenance"]["epochs"] == 5
    assert other["settings"] == "epochs=5"


def test_a_quick_look_scores_some_images_and_is_never_taken_for_a_whole_score(
    run, tiny, capsys
) -> None:
    whole = finetune.knn(probe(run, tiny))
    config = probe(run, tiny, max_images=30)
    results = finetune.knn(config)
    assert "mae-et: max_images: 30 of 40 train images, drawn evenly" in capsys.readouterr().err
    assert results["settings"] == "max_images=30"
    counts = [results["provenance"][f"{split}_images"] for split in ("train", "val")]
    assert counts == [30, 20]
    figures = RunRecord(run).figures
    assert (figures["knn"], figures["max_images=30 knn"]) == (whole["knn"], results["knn"])
    encoder = open_encoder(run)
    every, some = (
        extract_dataset_features(encoder, tiny().data, config, "train", "cpu", max_images=most)
        for most in (None, 14)
    )
    chosen = drawn_evenly(40, 14)
    assert torch.equal(some.vectors, every.vectors[chosen])
    assert torch.equal(some.labels, every.labels[chosen])


def test_features_are_kept_for_the_next_score_of_the_same_encoder_and_images(
    run, tiny, tmp_path, monkeypatch, capsys
) -> None:
    def cached(**settings) -> ProbeConfig:
        return probe(run, tiny, feature_cache=tmp_path / "kept", **settings)

    kept = tmp_path / "kept"
    expected = [score(probe(run, tiny)) for score in (finetune.knn, finetune.linear_probe)]
    assert finetune.knn(cached()) == expected[0]
    files = set(kept.iterdir())
    assert len(files) == 2
    with monkeypatch.context() as patch:
        patch.setattr("finetune.probing.features.encode_images", None)
        assert finetune.linear_probe(cached()) == expected[1]
    assert f"mae-et: features of 40 images read from {kept}" in capsys.readouterr().err
    for other in ({"pool": "cls"}, {"precision": "bf16"}, {"max_images": 10}, {"batch_size": 7}):
        before = len(set(kept.iterdir()))
        finetune.knn(cached(**other))
        assert len(set(kept.iterdir())) == before + 2
    finetune.knn(cached(untrained=True))
    assert len(set(kept.iterdir())) == 12
    for file in files:
        file.write_bytes(file.read_bytes()[:-8])
    assert finetune.knn(cached()) == expected[0]
    assert "is damaged, and computed again" in capsys.readouterr().err


def test_scoring_reports_its_progress_where_no_terminal_shows_a_bar(
    run, tiny, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    score_encoder(probe(run, tiny))
    said = capsys.readouterr().err
    for line in ("train: 40 of 40 images, 0:00:00 left", "val: 20 of 20 images, 0:00:00 left"):
        assert f"mae-et: {line}" in said
    assert re.search(r"mae-et: linear probe: 1 of \d+ steps, 0:00:0\d left", said)


def test_scores_of_a_finished_run_are_kept_in_it_for_compare(run, tiny, tmp_path, capsys) -> None:
    results = finetune.knn(probe(run, tiny))
    path = run / "knn" / "results.json"
    assert f"scores written to {path}" in capsys.readouterr().err
    assert json.loads(path.read_text()) == results
    assert RunRecord(run).figures["knn"] == results["knn"]
    path.write_text("")
    finetune.knn(probe(run, tiny, output=tmp_path / "elsewhere"))
    (run / "results.json").unlink()  # an unfinished run has another encoder later
    finetune.knn(probe(run, tiny))
    assert path.read_text() == ""


def test_scores_that_cannot_be_kept_in_a_run_are_printed(
    run, tiny, tmp_path, monkeypatch, capsys
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(probes, "write_record", refuse)
    assert "knn" in finetune.knn(probe(run, tiny))
    path = run / "knn" / "results.json"
    said = f"scores are only printed, {path} cannot be written: Permission denied"
    assert said in capsys.readouterr().err
    with pytest.raises(PermissionError):  # for an output that was requested
        finetune.knn(probe(run, tiny, output=tmp_path / "scores"))


def test_scores_of_other_data_or_settings_are_kept_beside_each_other(run, tiny, capsys) -> None:
    finetune.knn(probe(run, tiny, untrained=True))
    before = RunRecord(run).figures
    other = dataclasses.replace(tiny().data, synthetic_val=12)
    finetune.knn(dataclasses.replace(probe(run, tiny, pool="cls"), data=other))
    assert "1 of other data, settings or weights are kept beside it" in capsys.readouterr().err
    finetune.knn(probe(run, tiny))  # again: replaces the first, but for what it lacks
    found = RunRecord(run).figures
    assert {key: found[key] for key in before} == before
    assert len([key for key in found if key.endswith("pool=cls knn")]) == 1
    assert len(list((run / "knn").glob("results-*.json"))) == 2


def test_several_runs_are_scored_by_one_command(run, tmp_path, capsys) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copyfile(run / "config.yaml", empty / "config.yaml")
    flags = ["--num_workers=0", "--device=cpu"]
    assert main(["knn", str(run), str(empty), str(other), *flags]) == 2
    assert f"not scored: {other}" in capsys.readouterr().err
    assert main(["knn", str(tmp_path), str(run), str(other), *flags]) == 0
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert f"not scored, as they hold no run: {tmp_path}" in said.err
    for folder, results in zip((run, other), lines, strict=True):
        assert json.loads((folder / "knn" / "results.json").read_text()) == results
        assert results["provenance"]["checkpoint"] == str(folder.resolve())
    assert main(["knn", str(run), str(other), f"--output={tmp_path / 'x'}"]) == 2
    assert "output is for one run" in capsys.readouterr().err
    assert main(["knn", str(run), str(tmp_path)]) == 2  # data, most likely
    assert "data come after --data.root" in capsys.readouterr().err


def test_classes_without_a_training_image_are_reported(run, tiny, monkeypatch, capsys) -> None:
    """Numbers are labels in shards, whatever the training split has."""
    vectors = torch.rand(8, 4)
    splits = {"train": torch.arange(8) % 2, "val": torch.arange(8) % 4}
    monkeypatch.setattr(
        "finetune.probing.probes.extract_dataset_features",
        lambda encoder, data, config, split, device, max_images: Features(vectors, splits[split]),
    )
    score_encoder(probe(run, tiny), linear=False)
    line = "4 of 8 validation images are of classes without a training image, and count as wrong"
    assert line in capsys.readouterr().err


def test_data_default_to_the_run_s_own_and_are_required_for_other_files(run, tiny) -> None:
    config = dataclasses.replace(probe(run, tiny), data=None)
    assert finetune.knn(config) == finetune.knn(probe(run, tiny))
    config = dataclasses.replace(config, checkpoint=run / "encoder.safetensors")
    with pytest.raises(UserError, match="data must be given"):
        finetune.knn(config)


def test_a_finished_run_without_checkpoints_falls_back_to_its_encoder(run, tiny, capsys) -> None:
    expected = finetune.knn(dataclasses.replace(probe(run, tiny), data=None))
    shutil.rmtree(run / "checkpoints")
    assert finetune.knn(dataclasses.replace(probe(run, tiny), data=None)) == expected
    assert load_pretrained(run).decoder is None
    assert main(["reconstruct", f"--checkpoint={run}"]) == 2
    assert "has no decoder" in capsys.readouterr().err
    (run / "encoder.safetensors").unlink()
    with pytest.raises(UserError, match="holds no checkpoint that loads"):
        load_pretrained(run)


def test_unlabelled_images_are_refused_before_any_is_read(run, tiny, monkeypatch) -> None:
    monkeypatch.setattr(Synthetic, "labels", np.array([-1] * 2 + [0] * 18), raising=False)
    for score in (score_encoder, lambda config: finetune.HeldOutAccuracy()(config.checkpoint)):
        with pytest.raises(
            UserError, match=r"encoder needs labelled images .* has 2 of \d+ images w"
        ):
            score(probe(run, tiny))
    with pytest.raises(UserError, match=r"of knn needs labelled images .* has 2 of"):
        finetune.HeldOutAccuracy().check(tiny().data, 3)


def test_features_of_a_bare_network_are_refused_as_its_image_size_is_unknown(tiny) -> None:
    network = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"must come from finetune\.open_encoder, got a Linear"):
        finetune.extract_dataset_features(network, tiny().data, None, "val", "cpu")


def test_accuracy_on_held_out_images_is_knn_s_with_the_other_images(run, tiny) -> None:
    objective = finetune.HeldOutAccuracy(share=0.5, images=30, num_workers=0, device="cpu")
    config = probe(run, tiny)
    found = extract_dataset_features(open_encoder(run), tiny().data, config, "train", "cpu")
    rest, held_out = (
        Features(found.vectors[part], found.labels[part]) for part in objective.split(40)
    )
    assert objective(run) == finetune.knn_accuracy(rest, held_out)
    assert objective(run) != finetune.knn_accuracy(found, held_out)


@pytest.mark.parametrize("count", [11, 65_537, 76_801])
def test_a_held_out_split_covers_each_image_once(count: int) -> None:
    rest, held_out = finetune.HeldOutAccuracy().split(count)
    assert len(held_out) == round(count / 10)
    assert sorted([*rest, *held_out]) == list(range(count))
    drawn = finetune.HeldOutAccuracy(images=10).split(count)
    assert [len(part) for part in drawn] == [9, 1]
