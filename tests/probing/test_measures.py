"""The closed-form linear probe and the effective rank, against plain re-statements."""

import numpy as np
import pytest
import torch
from clouds import clouds

from mae_et.probing.effective_rank import effective_rank
from mae_et.probing.ridge_classifier import RIDGES, ridge_accuracy


@pytest.mark.parametrize(("count", "seed", "spread"), [(60, 1, 4.0), (12, 13, 2.0), (8, 4, 2.0)])
def test_ridge_classifier_equals_scikit_learn_s_with_the_best_leave_one_out_penalty(
    count: int, seed: int, spread: float
) -> None:
    """With few images, the leverage of each, and of the intercept, decides the penalty."""
    from sklearn.linear_model import Ridge

    train, val = clouds(count, seed, spread=spread), clouds(300, seed + 100, spread=spread)
    mean, std = train.vectors.mean(0), train.vectors.std(0, correction=0)
    x, y = ((train.vectors - mean) / std).double().numpy(), np.eye(4)[train.labels.numpy()]
    queries = ((val.vectors - mean) / std).double().numpy()

    def left_out(ridge: float) -> float:
        right = 0
        for i in range(len(x)):
            rest = np.arange(len(x)) != i
            fit = Ridge(ridge * len(x)).fit(x[rest], y[rest])
            right += fit.predict(x[i : i + 1]).argmax() == y[i].argmax()
        return right

    best = max(RIDGES, key=left_out)
    found = Ridge(best * len(x)).fit(x, y).predict(queries).argmax(1)
    expected = 100 * float(np.mean(found == val.labels.numpy()))
    assert ridge_accuracy(train, val) == pytest.approx(expected)
    assert 30 < expected < 95


def test_ridge_classifier_takes_constant_features_and_more_features_than_images() -> None:
    train, val = clouds(20, 1), clouds(40, 2)
    wide = [torch.cat([part.vectors] * 5 + [torch.ones(len(part.labels), 3)], 1)
            for part in (train, val)]  # fmt: skip
    assert ridge_accuracy((wide[0], train.labels), (wide[1], val.labels)) > 90


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_effective_rank_is_the_number_of_equally_used_directions(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q[:rank]
    rows = torch.linalg.qr(torch.randn(400, rank, generator=generator)).Q
    assert effective_rank(5 * rows @ basis) == pytest.approx(rank, rel=1e-3)


def test_effective_rank_of_collapsed_features_is_1() -> None:
    assert effective_rank(torch.zeros(50, 8)) == pytest.approx(1, rel=1e-3)


def test_effective_rank_is_rankme_s_of_unequal_directions() -> None:
    sigma = torch.tensor([8.0, 4.0, 2.0, 1.0])
    share = sigma / 15
    expected = torch.exp(-(share * share.log()).sum()).item()
    assert effective_rank(torch.diag(sigma)) == pytest.approx(expected, rel=1e-5)
