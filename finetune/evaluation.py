"""Evaluate a trained classifier on a labelled split."""

import json
from pathlib import Path
from typing import Any, Literal

from torch import nn

from finetune.config import ClassifierConfig, Pool
from finetune.datasets import open_labelled
from finetune.image_size import Size
from finetune.model import load_run_network
from finetune.run_folder import read_classifier_config
from finetune.scores import score, write_tables
from finetune.scoring_config import EvaluateConfig
from finetune.vit import build_vit
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.run_config import read_classifier_description
from mae_et.checkpoints.weight_files import read_weight_file
from mae_et.config.schema import check_statistics
from mae_et.data.datasets import ImageDataset
from mae_et.data.image_folder import classes_without_images
from mae_et.data.loader import worker_count
from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.runtime import distributed
from mae_et.runtime.precision import autocast_dtype


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a classifier on the validation split.

    Returns:
        `data`, its name; `top1` and `top5` in percent; `loss`; `images`, their number.

    Raises:
        UserError: the checkpoint is not a classifier, or does not fit the data.
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


def _load(config: EvaluateConfig, run: ClassifierConfig | None) -> tuple[nn.Module, Size, int]:
    """Load a classifier; return it with the size and the channels of its images."""
    if run is not None:
        names = {"last": "model.safetensors", "best": "best.safetensors"}
        weights = config.checkpoint / names[config.weights]
        network = load_run_network(run.model, config.checkpoint, read_weight_file(weights))
        return network, run.model.image_size, run.model.channels
    found = load_weights(config.checkpoint, config.checkpoint_key)
    if not {"weight", "bias"} <= set(found.head):
        raise UserError(f"{config.checkpoint} is not a classifier: it has no head")
    pool: Pool = "mean" if "fc_norm.weight" in found.encoder else "cls"
    probe: Literal["linear", "none"] = "linear" if "running_mean" in found.head else "none"
    vit = build_vit(
        found, found.head["weight"].shape[0], config.image_size, pool, probe,
        encoder_num_heads=config.encoder_num_heads,
    )  # fmt: skip
    return vit, config.image_size, found.encoder["patch_embed.proj.weight"].shape[1]


def _check_classes(network: Any, source: ImageDataset, checkpoint: Path, is_run: bool) -> None:
    ours = list(source.classes)
    if network.num_classes != len(ours):
        raise UserError(
            f"{checkpoint} has {network.num_classes} classes, the dataset has {len(ours)}"
        )
    if is_run and read_classifier_description(checkpoint)["classes"] != ours:
        raise UserError(f"the classes of {checkpoint} and of the dataset have different names")
    empty = classes_without_images(source)
    if empty:
        raise UserError(f"the validation split has no image of {', '.join(empty[:5])}")
