"""Linear probe on cached features, against autograd and at ImageNet's size."""

import pytest
import torch
from clouds import clouds, separable

from finetune import Features, probe_features
from finetune.probing.linear_classifier import (
    BATCH_SIZE,
    accuracies,
    shuffled_batches,
    train_heads,
    train_probe,
)
from mae_et.runtime.console import notify


def test_separable_classes_are_found_and_noise_gives_chance() -> None:
    easy = probe_features(clouds(400, 1), clouds(200, 2), epochs=30)
    assert easy.accuracy > 97
    labels = torch.randint(0, 4, (2000,), generator=torch.Generator().manual_seed(3))
    noise = Features(torch.randn(2000, 8), labels)
    train, val = (Features(noise.vectors[i::2], labels[i::2]) for i in range(2))
    assert 18 < probe_features(train, val, epochs=10).accuracy < 32


def test_accuracy_does_not_depend_on_scale_or_offset() -> None:
    train, val = clouds(300, 1, spread=3.0), clouds(300, 2, spread=3.0)
    moved = [Features(1000 * f.vectors - 50, f.labels) for f in (train, val)]
    assert probe_features(*moved, epochs=20).accuracy == pytest.approx(
        probe_features(train, val, epochs=20).accuracy, abs=0.4
    )


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**-10, 2.0**30])
def test_features_are_standardised_alike_at_every_scale(scale: float) -> None:
    data = clouds(300, 1)
    probe = train_probe(data, epochs=1)
    scaled = train_probe(Features(data.vectors * scale, data.labels), epochs=1)
    torch.testing.assert_close(scaled.mean / scale, probe.mean)
    torch.testing.assert_close(scaled.std / scale, probe.std)
    torch.testing.assert_close(scaled.head, probe.head)


@pytest.mark.parametrize(
    ("best", "said"),
    [(0, "rate 0.003 is the smallest of"), (5, "rate 1.0 is the largest of"), (2, "")],
)
def test_a_rate_at_the_edge_of_the_grid_is_reported(best, said: str, monkeypatch, capsys) -> None:
    scores = torch.eye(6)[best]
    notify.cache_clear()
    monkeypatch.setattr("finetune.probing.linear_classifier.accuracies", lambda *_: scores)
    train_probe(clouds(400, 1), epochs=1)
    heard = capsys.readouterr().err
    assert said in heard if said else heard == ""


def raw_heads(data: Features, rates: tuple[float, ...], epochs: int) -> torch.Tensor:
    """Train heads without standardisation."""
    every = torch.arange(len(data.labels))
    return train_heads(*data, every, torch.zeros(8), torch.ones(8), rates, epochs, seed=0)


def test_heads_trained_together_equal_heads_trained_alone() -> None:
    data = clouds(300, 1)
    together = raw_heads(data, (0.01, 0.3), epochs=3)
    for place, rate in enumerate((0.01, 0.3)):
        alone = raw_heads(data, (rate,), epochs=3)
        torch.testing.assert_close(alone[0], together[place], rtol=1e-4, atol=1e-5)


def test_heads_are_trained_as_torch_s_sgd_trains_them() -> None:
    """From zero, two batches an epoch, with momentum and half a cosine."""
    data = clouds(600, 1)
    head = raw_heads(data, (0.5,), epochs=3)[0]
    layer = torch.nn.Linear(8, 4)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    generator, every = torch.Generator().manual_seed(0), torch.arange(600)
    for batch in (b for _ in range(3) for b in shuffled_batches(every, generator)):
        optimizer.zero_grad()
        logits = layer(data.vectors[batch])
        torch.nn.functional.cross_entropy(logits, data.labels[batch]).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(head[:-1], layer.weight.detach().T)
    torch.testing.assert_close(head[-1], layer.bias.detach())
    found = accuracies(head[None], *data, every, torch.zeros(8), torch.ones(8))
    assert found[0] > 80


def test_a_rate_is_chosen_on_images_that_it_was_not_trained_on_and_then_trained_on_all() -> None:
    """Random labels of fewer images than features can be learned, and not predicted."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 500, generator=generator)
    labels = torch.randint(0, 4, (400,), generator=generator)
    probe = train_probe((noise, labels), epochs=20)
    assert probe.held_out_accuracy < 50
    assert probe.accuracy((noise, labels)) == 100


@pytest.mark.parametrize("count", [1, 255, 257, 65_537, 76_801, 1_153_051, 1_281_167])
def test_an_epoch_shows_each_image_once_in_batches_of_one_size(count: int) -> None:
    batches = shuffled_batches(torch.arange(count), torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(count))
    assert {len(batch) for batch in batches[:-1]} <= {len(batches[0])}
    assert len(batches[-1]) <= len(batches[0]) < 2 * BATCH_SIZE
    assert count < BATCH_SIZE or len(batches[0]) >= BATCH_SIZE


def test_unlabelled_images_and_no_epoch_are_refused() -> None:
    with pytest.raises(ValueError, match="an unlabelled image"):
        probe_features((torch.zeros(3, 2), torch.tensor([0, -1, 1])), separable(4))
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        probe_features(separable(4), separable(4), epochs=0)
