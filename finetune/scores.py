"""Top-1, top-5, loss and confusion matrix of a classifier, computed over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from finetune.image_size import Size
from mae_et.config.data import DataConfig
from mae_et.data.datasets import ImageDataset
from mae_et.data.loader import batches_of, data_loader
from mae_et.data.transforms import EvalDataset, normalise
from mae_et.io.atomic import write_text_atomically
from mae_et.monitoring.figures import standard_error
from mae_et.monitoring.progress import Progress
from mae_et.monitoring.tables import csv_table
from mae_et.runtime import distributed
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import autocast
from mae_et.runtime.watchdog import heartbeat

MAX_CONFUSION_CLASSES = 2000
"""Maximum number of classes in a confusion matrix; a larger one would be mostly zeros."""


@dataclass(frozen=True)
class Scores:
    """Scores of a classifier on a split of C classes."""

    images: Tensor
    """int64 [C]: images of each class."""
    correct: Tensor
    """int64 [C]: correctly classified images of each class."""
    predicted: Tensor
    """int64 [C]: images predicted to be of each class."""
    top5: int
    """Images whose class is among the five most likely."""
    loss: float
    """Mean cross-entropy."""
    confusion: Tensor | None
    """int64 [C C]: images of class i (row) predicted as class j; None if C is too large."""

    def summary(self) -> dict[str, Any]:
        """Return top-1 and top-5 in percent, the mean loss, and the number of images.

        Top-1 has its standard error, in points. Up to five classes have no top-5, which is 100.
        """
        images = int(self.images.sum())
        top1 = 100 * int(self.correct.sum()) / images
        top5 = {"top5": round(100 * self.top5 / images, 3)} if len(self.images) > 5 else {}
        return {
            "top1": round(top1, 3),
            "top1_standard_error": round(standard_error(top1, images), 3),
            **top5,
            "val_loss": round(self.loss, 5),
            "val_images": images,
        }


@torch.no_grad()
def score(
    network: nn.Module, source: ImageDataset, data: DataConfig, size: Size,
    world: DistributedContext, dtype: torch.dtype | None, batch_size: int, workers: int,
    indices: Sequence[int] | None = None,
) -> Scores:  # fmt: skip
    """Score a network on a split, or on the images at `indices`.

    Rank r of n scores images r, r + n, ..., so each counts once.

    The network maps centre crops [B C H W] of the given size to logits [B classes] under autocast
    to `dtype`.
    """
    classes = len(source.classes)
    crops = EvalDataset(source, data, size)
    chosen = range(len(crops)) if indices is None else indices
    mine = Subset(crops, chosen[world.rank :: world.size])
    images, correct, predicted = torch.zeros(3, classes, dtype=torch.int64)
    confusion = None
    if classes <= MAX_CONFUSION_CLASSES:
        confusion = torch.zeros(classes * classes, dtype=torch.int64)
    sums = torch.zeros(2, dtype=torch.float64)
    was_training = network.training
    network.eval()
    with (
        batches_of(data_loader(mine, workers, batch_size=batch_size)) as batches,
        Progress("evaluation", len(mine), bar=False) as progress,
    ):
        for pixels, labels in batches:
            heartbeat()
            pixels = normalise(pixels.to(world.device), data.mean, data.std)
            with autocast(dtype, world.device):
                logits = network(pixels)
            logits = logits.float().cpu()
            top = logits.topk(min(5, classes), dim=1).indices
            images += labels.bincount(minlength=classes)
            correct += labels[top[:, 0] == labels].bincount(minlength=classes)
            predicted += top[:, 0].bincount(minlength=classes)
            if confusion is not None:
                confusion += (labels * classes + top[:, 0]).bincount(minlength=classes**2)
            sums[0] += (top == labels[:, None]).any(dim=1).sum()
            sums[1] += F.cross_entropy(logits, labels, reduction="sum")
            progress.advance(len(labels))
    network.train(was_training)
    images, correct, predicted, sums = (
        distributed.all_reduce_sum(part, world) for part in (images, correct, predicted, sums)
    )
    if confusion is not None:
        confusion = distributed.all_reduce_sum(confusion, world).view(classes, classes)
    top5, loss = sums.tolist()
    return Scores(images, correct, predicted, round(top5), loss / int(images.sum()), confusion)


def write_tables(folder: Path, scores: Scores, classes: list[str]) -> None:
    """Write `classes.csv` and, unless there are too many classes, `confusion.csv` to a folder.

    Its rows are true classes, its columns predicted ones.
    """
    counts = (scores.images.tolist(), scores.correct.tolist(), scores.predicted.tolist())
    rows = [
        [name, str(images), _percent(correct, images), _percent(correct, predicted)]
        for name, images, correct, predicted in zip(classes, *counts, strict=True)
    ]
    table = csv_table(["class", "images", "recall", "precision"], rows)
    write_text_atomically(folder / "classes.csv", f"{table}\n")
    if scores.confusion is not None:
        confusion = zip(classes, scores.confusion.tolist(), strict=True)
        table = csv_table(["", *classes], [[name, *map(str, row)] for name, row in confusion])
        write_text_atomically(folder / "confusion.csv", f"{table}\n")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}" if whole else ""
