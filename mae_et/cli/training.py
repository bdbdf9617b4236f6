"""Commands that train: pre-training, the demo, classifiers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import finetune as downstream
import mae_et
from finetune.datasets import open_splits
from finetune.run_folder import check_training_data
from mae_et.cli.arguments import Arguments, config_of
from mae_et.cli.output import prints_results, results_of
from mae_et.config.schema import PretrainConfig
from mae_et.data.datasets import ImageDataset, open_dataset
from mae_et.errors import UserError
from mae_et.runtime.console import is_main, say
from mae_et.training.opening import Opening, open_training_images


def _demo_config(name: str, arguments: Arguments) -> PretrainConfig:
    """Parse the demo's keys; on other data than the embedded, it has another run folder."""
    config: PretrainConfig = config_of(name, ["--config=demo", *arguments])
    data, output = config.data, config.output
    if output.dir != Path("runs/demo") or data.source == "synthetic":
        return config
    name = data.root.resolve().name if data.root else data.source
    return replace(config, output=replace(output, dir=Path(f"runs/demo-{name}")))


@prints_results("demo", _demo_config)
def demo(config: PretrainConfig) -> dict[str, Any]:
    """Pre-train, probe and reconstruct a small model: minutes on a CPU."""
    opening = Opening("demo", config, _open_demo_images)
    _ = opening.data  # of a finished demo too, whose batch depends on them
    config = opening.config
    folder = mae_et.pretrain(config, opening=opening)
    if not is_main():
        return {}
    efficiency = config.efficiency
    probe = downstream.ProbeConfig(
        folder, untrained=True, num_workers=efficiency.num_workers, device=efficiency.device
    )
    try:
        accuracies = downstream.score_encoder(probe)
    except UserError as error:  # unlabelled images, most likely
        say(f"not scored: {error}")
        accuracies = {}
    return results_of(config.output) | accuracies


def _open_demo_images(opening: Opening[ImageDataset]) -> ImageDataset:
    """Open the demo's images; fewer than a batch are one batch."""
    config: PretrainConfig = opening.config
    source = open_dataset(config.data, "train", config.model.channels)
    if len(source) < config.optim.batch_size:
        say(f"optim.batch_size {len(source)}, all training images, not {config.optim.batch_size}")
        opening.config = replace(config, optim=replace(config.optim, batch_size=len(source)))
    return open_training_images(opening, source)


@prints_results("pretrain")
def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Pre-train a masked autoencoder; resumes from its run folder."""
    opening = Opening("pretrain", config, open_training_images).open_early()
    mae_et.pretrain(config, opening=opening)
    return results_of(config.output)


@prints_results("finetune")
def finetune(config: downstream.ClassifierConfig) -> dict[str, Any]:
    """Fine-tune or probe a checkpoint on labelled images."""
    check_training_data(config)
    return _classify("finetune", config)


@prints_results("supervised")
def supervised(config: downstream.ClassifierConfig) -> dict[str, Any]:
    """Train a timm model from scratch, with or without a curriculum."""
    return _classify("supervised", config)


def _classify(command: str, config: downstream.ClassifierConfig) -> dict[str, Any]:
    opening = Opening(command, config, open_splits).open_early()
    downstream.classify(config, opening=opening)
    return results_of(config.output)
