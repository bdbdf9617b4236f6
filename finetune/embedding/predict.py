"""Write the predicted classes of images to a table: `mae-et predict`.

It streams and resumes as `mae-et embed` does: its rows are the K highest probabilities, and the
numbers of their classes.
"""

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.embedding.images import Part, names_of, open_parts, report_parts
from finetune.embedding.output import description_of, is_finished, settings_of
from finetune.embedding.resumable import RowsTask, write_rows
from finetune.embedding.rows import FeatureRows
from finetune.evaluation.trained_classifier import load_classifier
from finetune.feature_config import PredictConfig
from finetune.image_size import height_and_width
from finetune.probing.frozen_encoder import FrozenEncoder, refuse_to_initialise
from finetune.run_folder import data_to_evaluate, read_classifier_config
from mae_et.checkpoints.layouts.timm_hub import require_checkpoint
from mae_et.checkpoints.preprocessing import report_preprocessing
from mae_et.checkpoints.source import recognise
from mae_et.config.data import DataConfig, check_statistics
from mae_et.config.typed import typed
from mae_et.io.plain_files import no_follow, read_mapping
from mae_et.monitoring.tables import csv_cell


@torch.no_grad()
def predict(config: PredictConfig) -> dict[str, Any]:
    """Write the most likely classes of images to `config.output`, resuming a partial file.

    The table has a row for each image, in the order of `embed`: `name`, `split`, `class` and
    `probability` (softmax of the logits, in [0, 1]), and those of the next classes as `class_2`,
    `probability_2`, ... An image that cannot be read has a name and empty cells.

    Returns:
        The file, the number of images, and how many of them could not be read.

    Raises:
        UserError: the checkpoint is not a classifier, the data or the output cannot be used, or the
            output has predictions of another classifier, other images or other settings.
        RunFailed: too many images cannot be read.
    """
    config = typed(config, PredictConfig)
    require_checkpoint(config.checkpoint)
    run = read_classifier_config(config.checkpoint)
    data = data_to_evaluate(config, run)
    source = recognise(config.checkpoint, config.checkpoint_key, config.architecture)
    report_preprocessing(source.preprocessing(), data, config.checkpoint)
    classifier = load_classifier(config, run)
    check_statistics(data, classifier.channels)
    parts = open_parts(data, config.split, classifier.channels)
    images = report_parts(parts, "classify")
    network, size = classifier.network, height_and_width(classifier.image_size)
    frozen = FrozenEncoder(network, network, size, partial(refuse_to_initialise, network))
    names = list(classifier.classes or ())
    names += map(str, range(len(names), network.num_classes))
    count = min(config.top_k, len(names))
    settings = settings_of(config, config.output, frozen, data, parts, classes=names, top_k=count)

    def row_of(logits: Tensor) -> Tensor:
        likely = logits[0].softmax(dim=-1).topk(count)
        return torch.stack([likely.values, likely.indices.float()], dim=1)  # [B 2 K]

    def finish(folder: Path, rows: FeatureRows) -> Path:
        return _write_table(folder / "csv", rows, names, parts, data)

    if not is_finished(config.output, settings):
        write_rows(RowsTask(
            "predict", config, config.output, settings, frozen, data, parts, row_of, finish,
            "empty",
        ))  # fmt: skip
    unreadable = read_mapping(description_of(config.output))["unreadable"]
    return {"predictions": str(config.output), "images": images, "unreadable": len(unreadable)}


def _write_table(
    path: Path, rows: FeatureRows, names: Sequence[str], parts: Sequence[Part], data: DataConfig
) -> Path:
    """Write a line for each image, a row in memory at a time."""
    count = rows.shape[-1]
    endings = ("", *(f"_{place}" for place in range(2, count + 1)))
    cells = [csv_cell(name) for name in names]
    features, unreadable = rows.features(), set(rows.unreadable)
    with open(path, "w", encoding="utf-8", newline="", opener=no_follow) as file:
        writer = csv.writer(file)
        head = (f"{column}{ending}" for ending in endings for column in ("class", "probability"))
        writer.writerow(["name", "split", *head])
        for row, (name, split) in enumerate(names_of(parts, data)):
            likely: list[str] = []
            if row not in unreadable:
                for probability, number in zip(*features[row].tolist(), strict=True):
                    likely += [cells[int(number)], f"{probability:.6g}"]
            writer.writerow([csv_cell(name), split, *(likely or [""] * 2 * count)])
    return path
