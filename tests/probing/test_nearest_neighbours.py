"""kNN accuracy, against a plain re-statement and at ImageNet's size."""

import re

import numpy as np
import pytest
import torch
from clouds import clouds, separable

from finetune import Features, knn_accuracy, probe_features
from mae_et.probing.ridge_classifier import ridge_accuracy


@pytest.mark.parametrize(
    ("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (500, 1.0), (20, 0.005)]
)
def test_accuracy_equals_scikit_learn_s(k: int, temperature: float) -> None:
    """Of cosine votes weighted alike."""
    from sklearn.neighbors import KNeighborsClassifier

    train, val = clouds(400, 1, spread=3.0), clouds(200, 2, spread=3.0)
    theirs = KNeighborsClassifier(
        min(k, 400),
        metric="cosine",
        algorithm="brute",
        weights=lambda d: np.exp((1 - d.astype(float)) / temperature),
    )
    theirs.fit(train.vectors.numpy(), train.labels.numpy())
    expected = 100 * theirs.score(val.vectors.numpy(), val.labels.numpy())
    assert knn_accuracy(train, val, k, temperature) == pytest.approx(expected)
    assert 25 < expected < 100


@pytest.mark.parametrize("count", [1, 19, 65_537, 76_801, 1_281_167])
def test_any_number_of_training_images_votes(count: int) -> None:
    train, val = separable(count), separable(64)
    expected = 50 if count == 1 else 100
    assert knn_accuracy(train, val, neighbours=1) == expected


def test_validation_of_any_size_is_scored_in_blocks() -> None:
    assert knn_accuracy(separable(101), separable(76_801), neighbours=1) == 100


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        ((torch.zeros(3), torch.zeros(3, dtype=torch.int64)), "features [N D] and labels [N]"),
        ((torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)), "shapes [3, 2] and [2]"),
        ((torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)), "with N > 0"),
        ((torch.zeros(3, 2), torch.zeros(3)), "int64 labels, got torch.float32 and torch.float32"),
        ((torch.arange(6).view(3, 2), torch.arange(3)), "got torch.int64 and torch.int64"),
        ((torch.zeros(3, 2), torch.tensor([0, -1, 1])), "an unlabelled image (label -1)"),
        ((torch.full((3, 2), torch.nan), torch.arange(3)), "features that are not finite"),
        ((torch.zeros(3, 5), torch.arange(3)), "one width and type, got 5 of torch.float32 and"),
        ((torch.zeros(3, 2).half(), torch.arange(3)), "got 2 of torch.float16 and"),
    ],
)
def test_features_that_do_not_fit_their_labels_are_refused(train, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        knn_accuracy(train, separable(4))


@pytest.mark.parametrize("votes", [{"neighbours": 0}, {"temperature": 0.0}, {"temperature": -1.0}])
def test_votes_that_choose_nothing_are_refused(votes) -> None:
    with pytest.raises(ValueError, match="neighbours and temperature must be positive"):
        knn_accuracy(separable(4), separable(4), **votes)


@pytest.mark.parametrize("scale", [1e20, 1e-30])
def test_accuracies_do_not_depend_on_the_scale_of_the_features(scale: float) -> None:
    near, far = (clouds(150, seed, spread=3.0) for seed in (1, 2))
    scaled = [(part.vectors * scale, part.labels) for part in (near, far)]
    for measure in (knn_accuracy, ridge_accuracy, probe_accuracy):
        assert measure(*scaled) == pytest.approx(measure(near, far), abs=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_with_in_float32(dtype: torch.dtype) -> None:
    near, far = clouds(150, 1, spread=3.0), clouds(150, 2, spread=3.0)
    near.vectors[:3] = 0
    halves = [(part.vectors.to(dtype), part.labels) for part in (near, far)]
    floats = [(vectors.float(), labels) for vectors, labels in halves]
    for measure in (knn_accuracy, ridge_accuracy, probe_accuracy):
        assert measure(*halves) == measure(*floats)


def probe_accuracy(train: Features, val: Features) -> float:
    return probe_features(train, val, epochs=5).accuracy
