"""Score a classifier on a labelled split, every image once, over any number of processes."""

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from finetune.config import ClassifierConfig, Pool
from finetune.datasets import open_labelled
from finetune.image_size import Size
from finetune.model import build_vit, load_run_network
from finetune.scoring_config import EvaluateConfig
from finetune.transforms import eval_dataset
from mae_et.checkpoints.formats import load_weights, read_file
from mae_et.checkpoints.run_config import read_classes, read_only
from mae_et.config.files import config_from_text
from mae_et.config.schema import DataConfig, check_statistics
from mae_et.data.datasets import ImageDataset
from mae_et.data.image_folder import classes_without_images
from mae_et.data.loader import batches_of, eval_loader, worker_count
from mae_et.data.transforms import normalise
from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.io.plain_files import read_text
from mae_et.runtime import distributed
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import autocast, autocast_dtype
from mae_et.runtime.watchdog import heartbeat

# A table of more classes than this would be larger than what it is made from.
MOST_CLASSES_IN_TABLE = 2000


@dataclass(frozen=True)
class Scores:
    """What a classifier reaches on a split of C classes."""

    images: Tensor
    """int64 [C]: images of each class."""
    right: Tensor
    """int64 [C]: those taken for what they are."""
    taken: Tensor
    """int64 [C]: images taken for each class."""
    top5: int
    """Images whose class is among the five likeliest."""
    loss: float
    """Mean cross-entropy."""
    confusion: Tensor | None
    """int64 [C C]: images of class i (row) taken for class j; None where C is too large for it."""

    def summary(self) -> dict[str, Any]:
        """Return top-1 and top-5 in percent, the loss, and the number of images."""
        images = int(self.images.sum())
        return {
            "top1": round(100 * int(self.right.sum()) / images, 3),
            "top5": round(100 * self.top5 / images, 3),
            "loss": round(self.loss, 5),
            "images": images,
        }


@torch.no_grad()
def score(
    network: nn.Module, source: ImageDataset, data: DataConfig, size: Size,
    world: DistributedContext, dtype: torch.dtype | None, batch_size: int, workers: int,
) -> Scores:  # fmt: skip
    """Score a network; process r of n takes the images r, r + n, ..., so none is counted twice."""
    classes = len(source.classes)
    view = eval_dataset(source, data, size)
    mine = Subset(view, range(world.rank, len(view), world.size))
    images, right, taken = torch.zeros(3, classes, dtype=torch.int64)
    confusion = None
    if classes <= MOST_CLASSES_IN_TABLE:
        confusion = torch.zeros(classes * classes, dtype=torch.int64)
    sums = torch.zeros(2, dtype=torch.float64)
    was_training = network.training
    network.eval()
    with batches_of(eval_loader(mine, batch_size, workers)) as batches:
        for pictures, labels in batches:
            heartbeat()
            pixels = normalise(pictures.to(world.device), data.mean, data.std)
            with autocast(dtype, world.device):
                logits = network(pixels)
            logits = logits.float().cpu()
            likeliest = logits.topk(min(5, classes), dim=1).indices
            first = likeliest[:, 0]
            images += labels.bincount(minlength=classes)
            right += labels[first == labels].bincount(minlength=classes)
            taken += first.bincount(minlength=classes)
            if confusion is not None:
                confusion += (labels * classes + first).bincount(minlength=classes**2)
            sums[0] += (likeliest == labels[:, None]).any(dim=1).sum()
            sums[1] += F.cross_entropy(logits, labels, reduction="sum")
    network.train(was_training)
    images, right, taken, sums = (
        distributed.all_reduce_sum(part, world) for part in (images, right, taken, sums)
    )
    if confusion is not None:
        confusion = distributed.all_reduce_sum(confusion, world).view(classes, classes)
    top5, loss = sums.tolist()
    return Scores(images, right, taken, round(top5), loss / int(images.sum()), confusion)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Return top-1, top-5 (percent) and loss of a checkpoint.

    Raises:
        UserError: the checkpoint is no classifier, or does not fit the data.
    """
    run = read_classifier_config(config.checkpoint)
    data = config.data or (run.data if run else None)
    if data is None:
        raise UserError("data must be given (--data.root or --data.name)")
    world = distributed.initialize(config.device)
    try:
        network, size, channels = _load(config, run)
        check_statistics(data, channels)
        source = open_labelled(data, "val", channels, "an evaluation")
        _check_classes(network, source, config.checkpoint, run is not None)
        dtype = autocast_dtype(config.precision, world.device)
        scores = score(
            network.to(world.device), source, data, size, world, dtype, config.batch_size,
            worker_count(config.num_workers, world.size),
        )  # fmt: skip
    finally:
        distributed.shutdown(world)
    results = {"data": str(data.root or data.source)} | scores.summary()
    if config.output is not None and world.is_main:
        write_tables(config.output, scores, list(source.classes))
        write_text_atomically(config.output / "results.json", json.dumps(results, indent=1))
    return results


def write_tables(folder: Path, scores: Scores, classes: list[str]) -> None:
    """Write `classes.csv` and, unless there are too many classes, `confusion.csv` to a folder.

    Rows of the latter are true classes, columns what they were taken for.
    """
    each = [["class", "images", "recall", "precision"]]
    counts = (scores.images.tolist(), scores.right.tolist(), scores.taken.tolist())
    for name, images, right, taken in zip(classes, *counts, strict=True):
        each.append([name, str(images), _percent(right, images), _percent(right, taken)])
    _write_csv(folder / "classes.csv", each)
    if scores.confusion is not None:
        rows = [["", *classes]]
        for name, row in zip(classes, scores.confusion.tolist(), strict=True):
            rows.append([name, *map(str, row)])
        _write_csv(folder / "confusion.csv", rows)


def read_classifier_config(path: Path) -> ClassifierConfig | None:
    """Return the config of a classifier's run folder; None for other files."""
    written = path / "config.yaml"
    if not (path / "classes.json").is_file() or not written.is_file():
        return None
    if not (path / "model.safetensors").is_file():
        raise UserError(f"{path} is the folder of a classifier's run that is not finished")
    config = config_from_text(read_text(written), ClassifierConfig)
    return replace(config, data=read_only(config.data))


def _load(config: EvaluateConfig, run: ClassifierConfig | None) -> tuple[nn.Module, Size, int]:
    """Return a classifier, and the size and channels of its images."""
    if run is not None:
        names = {"last": "model.safetensors", "best": "best.safetensors"}
        weights = config.checkpoint / names[config.weights]
        network = load_run_network(run.model, config.checkpoint, read_file(weights))
        return network, run.model.image_size, run.model.channels
    found = load_weights(config.checkpoint)
    if not {"weight", "bias"} <= set(found.head):
        raise UserError(f"{config.checkpoint} is no classifier: it has no head")
    pool: Pool = "mean" if "fc_norm.weight" in found.encoder else "cls"
    probe: Literal["linear", "none"] = "linear" if "running_mean" in found.head else "none"
    vit = build_vit(
        found, found.head["weight"].shape[0], config.image_size, pool, probe,
        encoder_num_heads=config.encoder_num_heads,
    )  # fmt: skip
    return vit, config.image_size, found.encoder["patch_embed.proj.weight"].shape[1]


def _check_classes(network: Any, source: ImageDataset, checkpoint: Path, is_run: bool) -> None:
    has, ours = network.num_classes, list(source.classes)
    if has != len(ours):
        raise UserError(f"{checkpoint} tells {has} classes, the data have {len(ours)}")
    if is_run and read_classes(checkpoint)["classes"] != ours:
        raise UserError(f"{checkpoint} tells other classes than the data have")
    empty = classes_without_images(source)
    if empty:
        raise UserError(f"the validation split has no image of {', '.join(empty[:5])}")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}" if whole else ""


def _write_csv(path: Path, rows: list[list[str]]) -> None:
    lines: list[str] = []
    csv.writer(_Lines(lines)).writerows(rows)
    write_text_atomically(path, "".join(lines))


class _Lines:
    """What csv writes to."""

    def __init__(self, lines: list[str]):
        self.write = lines.append
