"""Scores of frozen features, against plain re-statements."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune
from finetune import Features, ProbeConfig, extract_dataset_features, score_encoder
from finetune.linear_classifier import accuracies, probe_features, train_heads
from finetune.nearest_neighbours import knn_accuracy
from mae_et import UserError, load_pretrained, pretrain
from mae_et.checkpoints.store import list_checkpoints
from mae_et.cli.main import main
from mae_et.data.datasets import open_dataset
from mae_et.data.synthetic import Synthetic
from mae_et.data.transforms import EvalDataset, normalise


def blobs(count: int, seed: int, classes: int = 4, spread: float = 1.0) -> Features:
    """Gaussian clouds around fixed centres, in 8 dimensions."""
    centres = 3 * torch.randn(classes, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    noise = spread * torch.randn(count, 8, generator=generator)
    return Features(centres[labels] + noise, labels)


def naive_knn(train: Features, val: Features, k: int, temperature: float) -> float:
    right = 0
    for vector, label in zip(val.vectors.double(), val.labels, strict=True):
        cosines = torch.cosine_similarity(vector[None], train.vectors.double())
        votes = [0.0] * 4
        for i in cosines.argsort(descending=True)[:k].tolist():
            votes[train.labels[i]] += float((cosines[i] / temperature).exp())
        right += votes.index(max(votes)) == int(label)
    return 100 * right / len(val.labels)


@pytest.mark.parametrize(
    ("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (500, 0.1), (20, 0.005)]
)
def test_knn_equals_a_naive_vote(k: int, temperature: float) -> None:
    train, val = blobs(200, 1, spread=3.0), blobs(60, 2, spread=3.0)
    found = knn_accuracy(train, val, k, temperature)
    assert found == pytest.approx(naive_knn(train, val, min(k, 200), temperature))
    assert 25 < found < 100


def test_knn_takes_more_images_than_a_chunk() -> None:
    train, val = blobs(300, 1), blobs(2500, 2)
    parts = [Features(val.vectors[i::2], val.labels[i::2]) for i in range(2)]
    mean = sum(knn_accuracy(train, part) for part in parts) / 2
    assert knn_accuracy(train, val) == pytest.approx(mean)


def test_the_probe_finds_what_is_linearly_separable_and_nothing_in_noise() -> None:
    easy = probe_features(blobs(400, 1), blobs(200, 2), epochs=30)
    assert easy.accuracy > 97
    labels = torch.randint(0, 4, (2000,), generator=torch.Generator().manual_seed(3))
    noise = Features(torch.randn(2000, 8), labels)
    train, val = (Features(noise.vectors[i::2], labels[i::2]) for i in range(2))
    assert 18 < probe_features(train, val, epochs=10).accuracy < 32


def test_the_probe_does_not_depend_on_scale_or_offset_of_the_features() -> None:
    train, val = blobs(300, 1, spread=3.0), blobs(300, 2, spread=3.0)
    moved = [Features(1000 * f.vectors - 50, f.labels) for f in (train, val)]
    assert probe_features(*moved, epochs=20).accuracy == pytest.approx(
        probe_features(train, val, epochs=20).accuracy, abs=0.4
    )


def raw_heads(data: Features, rates: tuple[float, ...], epochs: int) -> torch.Tensor:
    """Train heads without standardisation."""
    every = torch.arange(len(data.labels))
    return train_heads(*data, every, torch.zeros(8), torch.ones(8), rates, epochs, seed=0)


def test_heads_trained_together_are_those_trained_alone() -> None:
    data = blobs(300, 1)
    together = raw_heads(data, (0.01, 0.3), epochs=3)
    for place, rate in enumerate((0.01, 0.3)):
        alone = raw_heads(data, (rate,), epochs=3)
        torch.testing.assert_close(alone[0], together[place], rtol=1e-4, atol=1e-5)


def test_a_head_s_gradient_is_that_of_cross_entropy() -> None:
    """One full-batch step of SGD from zero equals autograd's."""
    data = blobs(50, 1)
    head = raw_heads(data, (0.5,), epochs=1)[0]
    layer = torch.nn.Linear(8, 4)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    torch.nn.functional.cross_entropy(layer(data.vectors), data.labels).backward()
    torch.testing.assert_close(head[:-1], -0.5 * layer.weight.grad.T)
    torch.testing.assert_close(head[-1], -0.5 * layer.bias.grad)
    found = accuracies(head[None], *data, torch.arange(50), torch.zeros(8), torch.ones(8))
    assert found[0] > 80


@pytest.fixture
def run(tiny) -> Path:
    return pretrain(tiny("--output.reconstruct_images=0"))


def probe(run: Path, tiny, **settings) -> ProbeConfig:
    return ProbeConfig(run, data=tiny().data, num_workers=0, device="cpu", epochs=5, **settings)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_features_are_the_encoder_s_tokens_in_the_order_of_the_data(run, tiny, pool: str) -> None:
    config = probe(run, tiny, pool=pool, batch_size=7)
    model = load_pretrained(run)
    data = tiny().data
    features = extract_dataset_features(model, data, config, "val", torch.device("cpu"))
    assert features.vectors.shape == (20, model.encoder.embed_dim)
    view = EvalDataset(open_dataset(data, "val"), data, 32)
    image, label = view[11]
    pixels = normalise(image[None], data.mean, data.std)
    tokens = model.encoder.forward_features(pixels)[0]
    expected = tokens[0] if pool == "cls" else tokens[1:].mean(0)
    torch.testing.assert_close(features.vectors[11], expected.detach(), rtol=1e-4, atol=1e-5)
    assert features.labels[11] == label


def test_scores_are_of_the_trained_and_of_the_untrained_encoder(run, tiny) -> None:
    results = score_encoder(probe(run, tiny, untrained=True))
    assert set(results) == {
        "data", "knn", "linear", "linear_learning_rate", "untrained_knn", "untrained_linear",
        "untrained_linear_learning_rate",
    }  # fmt: skip
    assert results.pop("data") == "synthetic"
    assert all(0 <= value <= 100 for value in results.values())
    json.dumps(results)
    assert finetune.knn(probe(run, tiny))["knn"] == results["knn"]
    assert finetune.linear_probe(probe(run, tiny))["linear"] == results["linear"]


def test_without_data_a_run_is_scored_on_its_own_and_other_files_are_refused(run, tiny) -> None:
    config = dataclasses.replace(probe(run, tiny), data=None)
    assert finetune.knn(config) == finetune.knn(probe(run, tiny))
    config = dataclasses.replace(config, checkpoint=run / "encoder.safetensors")
    with pytest.raises(UserError, match="data must be given"):
        finetune.knn(config)


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """Return the checkpoints that are read, as they are."""
    found: list[Path] = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **k: found.append(path) or real(path, **k))
    return found


def test_a_checkpoint_is_read_once_by_whatever_uses_it(run, tmp_path, reads) -> None:
    picture = f"--output={tmp_path / 'p.png'}"
    for command in (["knn"], ["knn", "--data.synthetic_val=20"], ["reconstruct", picture]):
        assert main([*command, f"--checkpoint={run}", "--device=cpu"]) == 0
        assert len(reads) == 1, command
        reads.clear()
    finetune.HeldOutAccuracy(num_workers=0, device="cpu")(run)
    assert len(reads) == 1
    reads.clear()
    assert main(["dynamics", f"--run={run}", "--bandwidths=[8]", "--num_workers=0"]) == 0
    assert len(set(reads)) == len(reads) == len(list_checkpoints(run / "checkpoints"))


def test_a_finished_run_without_its_checkpoints_has_its_encoder(run, tiny, capsys) -> None:
    expected = finetune.knn(dataclasses.replace(probe(run, tiny), data=None))
    shutil.rmtree(run / "checkpoints")
    assert finetune.knn(dataclasses.replace(probe(run, tiny), data=None)) == expected
    assert load_pretrained(run).decoder is None
    assert main(["reconstruct", f"--checkpoint={run}"]) == 2
    assert "has no decoder" in capsys.readouterr().err
    (run / "encoder.safetensors").unlink()
    with pytest.raises(UserError, match="holds no checkpoint that loads"):
        load_pretrained(run)


def test_images_without_a_label_are_not_scored(run, tiny, monkeypatch) -> None:
    """The labels are counted, and no image is read."""
    monkeypatch.setattr(Synthetic, "labels", np.array([-1] * 2 + [0] * 18), raising=False)
    for score in (score_encoder, lambda config: finetune.HeldOutAccuracy()(config.checkpoint)):
        with pytest.raises(UserError, match=r"encoder needs labelled images: 2 of \d+ images of"):
            score(probe(run, tiny))
    with pytest.raises(UserError, match="of knn needs labelled images: 2 of"):
        finetune.HeldOutAccuracy().check(tiny().data, 3)


def test_data_without_labels_are_refused(run, tiny, tmp_path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "flat" / f"{name}.png")
    flags = [f"--data.root={tmp_path / 'flat'}"]
    with pytest.raises(UserError, match="needs labelled images"):
        score_encoder(probe(run, lambda: tiny(*flags)))
