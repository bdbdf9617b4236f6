"""Commands that train: pre-training, the demo, classifiers."""

from dataclasses import replace
from pathlib import Path

import finetune as downstream
import mae_et
from finetune.datasets import open_splits
from mae_et.cli.arguments import Arguments, config_of
from mae_et.cli.output import print_run, split_json_flag
from mae_et.config.schema import PretrainConfig
from mae_et.errors import UserError
from mae_et.runtime.console import is_main, say
from mae_et.training.opening import Opening, open_training_images


def demo(arguments: Arguments) -> None:
    """Pre-train, probe and reconstruct a small model: minutes on a CPU."""
    arguments, as_json = split_json_flag(arguments)
    config = _beside_the_embedded_run(config_of("demo", ["--config=demo", *arguments]))
    opening = Opening("demo", config, open_training_images).open_early()
    folder = mae_et.pretrain(config, opening=opening)
    if not is_main():
        return
    efficiency = config.efficiency
    probe = downstream.ProbeConfig(
        folder, untrained=True, num_workers=efficiency.num_workers, device=efficiency.device
    )
    try:
        accuracies = downstream.score_encoder(probe)
    except UserError as error:  # unlabelled images, most likely
        say(f"not scored: {error}")
        accuracies = {}
    print_run(config.output, accuracies, as_json)


def _beside_the_embedded_run(config: PretrainConfig) -> PretrainConfig:
    """Return the demo's config, with a separate run folder if it trains on other data."""
    data, output = config.data, config.output
    if output.dir != Path("runs/demo") or data.source == "synthetic":
        return config
    name = data.root.resolve().name if data.root else data.source
    return replace(config, output=replace(output, dir=Path(f"runs/demo-{name}")))


def pretrain(arguments: Arguments) -> None:
    """Pre-train a masked autoencoder; resumes from its run folder."""
    arguments, as_json = split_json_flag(arguments)
    config = config_of("pretrain", arguments)
    opening = Opening("pretrain", config, open_training_images).open_early()
    mae_et.pretrain(config, opening=opening)
    print_run(config.output, {}, as_json)


def finetune(arguments: Arguments) -> None:
    """Fine-tune or probe a checkpoint on labelled images."""
    arguments, as_json = split_json_flag(arguments)
    config = config_of("finetune", arguments)
    if not (config.data.name or config.data.root):
        start = config.model.checkpoint
        if start is not None and not start.exists():
            raise UserError(f"there is no checkpoint {start}")
        raise UserError(
            f"data must be given (--data.root or --data.name): {start or config.model.backbone} "
            "does not say what it was trained on"
        )
    _classify("finetune", config, as_json)


def supervised(arguments: Arguments) -> None:
    """Train a timm model from scratch, with or without a curriculum."""
    arguments, as_json = split_json_flag(arguments)
    _classify("supervised", config_of("supervised", arguments), as_json)


def _classify(command: str, config: downstream.ClassifierConfig, as_json: bool) -> None:
    opening = Opening(command, config, open_splits).open_early()
    downstream.classify(config, opening=opening)
    print_run(config.output, {}, as_json)
