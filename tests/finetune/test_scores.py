"""Scores equal scikit-learn's, over any number of ranks."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from finetune.scores import Scores, score
from mae_et.config.data import DataConfig
from mae_et.data.sources.synthetic import Synthetic
from mae_et.data.transforms import EvalDataset, normalise
from mae_et.runtime import distributed
from mae_et.runtime.distributed import DistributedContext


def test_scores_equal_scikit_learn_s_and_each_image_counts_once_over_ranks(monkeypatch) -> None:
    from sklearn.metrics import confusion_matrix, top_k_accuracy_score

    source = Synthetic(53, 32)
    data = DataConfig(mean=(0.5,), std=(0.5,), eval_crop=1.0)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))

    def scores(rank: int = 0, ranks: int = 1, dtype: torch.dtype | None = None) -> Scores:
        world = DistributedContext(rank, ranks, torch.device("cpu"))
        return score(network, source, data, 32, world, dtype, 8, 0)

    whole = scores()
    view = EvalDataset(source, data, 32)
    pixels = normalise(torch.stack([view[i][0] for i in range(53)]), data.mean, data.std)
    labels = torch.tensor([view[i][1] for i in range(53)])
    with torch.no_grad():
        logits = network(pixels)
    assert whole.confusion.tolist() == confusion_matrix(labels, logits.argmax(1)).tolist()
    assert torch.equal(whole.correct, whole.confusion.diagonal())
    assert torch.equal(whole.images, labels.bincount(minlength=10))
    summary = whole.summary()
    assert summary["top1"] == pytest.approx(100 * int(whole.correct.sum()) / 53, abs=1e-3)
    top5 = top_k_accuracy_score(labels, logits.numpy(), k=5)
    assert summary["top5"] == pytest.approx(100 * top5, abs=1e-3)
    share = (int(whole.correct.sum()) + 2) / 57  # Agresti and Coull
    error = 100 * (share * (1 - share) / 57) ** 0.5
    assert summary["top1_standard_error"] == pytest.approx(error, abs=1e-3)
    assert "top5" not in replace(whole, images=torch.tensor([20, 20, 10, 2, 1])).summary()
    assert summary["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-4)
    assert whole.loss != scores(dtype=torch.bfloat16).loss == pytest.approx(whole.loss, rel=0.01)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda values, world: values)
    parts = [scores(rank, ranks=3) for rank in range(3)]
    assert torch.equal(sum(part.confusion for part in parts), whole.confusion)
    assert torch.equal(sum(part.predicted for part in parts), whole.confusion.sum(0))
    assert sum(part.top5 for part in parts) == whole.top5
    monkeypatch.setattr(sys.modules[score.__module__], "MAX_CONFUSION_CLASSES", 9)
    assert scores().confusion is None
