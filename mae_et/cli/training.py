"""Commands that train: pre-training, the demo, classifiers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import finetune as downstream
from finetune.datasets import open_splits
from finetune.run_folder import check_training_data
from mae_et.cli.arguments import Arguments, parse
from mae_et.cli.command import Command
from mae_et.cli.extension import split_stop
from mae_et.cli.output import results_of
from mae_et.config.schema import PretrainConfig
from mae_et.data.datasets import ImageDataset, open_dataset
from mae_et.errors import UserError
from mae_et.runtime.console import is_main, say
from mae_et.training.opening import open_early, open_training_images, say_command, say_facts


def demo_config(command: Command, arguments: Arguments) -> PretrainConfig:
    """Parse the demo's keys; on other data than the embedded, it has another run folder."""
    config: PretrainConfig = parse(command, ["--config=demo", *arguments])
    data, output = config.data, config.output
    if output.dir != Path("runs/demo") or data.source == "synthetic":
        return config
    name = data.root.resolve().name if data.root else data.source
    return replace(config, output=replace(output, dir=Path(f"runs/demo-{name}")))


def demo(config: PretrainConfig) -> dict[str, Any]:
    """Pre-train, probe and reconstruct a small model: minutes on a CPU."""
    from mae_et.pretraining import Pretraining
    from mae_et.training.session import train_run

    say_command("demo", config)
    config, source = _open_demo_images(config)  # of a finished demo too: its batch depends on them
    train_run(Pretraining(config, source))
    if not is_main():
        return {}
    efficiency = config.efficiency
    probe = downstream.ProbeConfig(
        config.output.dir,
        untrained=True,
        num_workers=efficiency.num_workers,
        device=efficiency.device,
    )
    try:
        accuracies = downstream.score_encoder(probe)
    except UserError as error:  # unlabelled images, most likely
        say(f"not scored: {error}")
        accuracies = {}
    return results_of(config.output) | accuracies


def _open_demo_images(config: PretrainConfig) -> tuple[PretrainConfig, ImageDataset]:
    """Open the demo's images, and return the config for them: fewer than a batch are one batch."""
    source = open_dataset(config.data, "train", config.model.channels)
    if len(source) < config.optim.batch_size:
        say(f"optim.batch_size {len(source)}, all training images, not {config.optim.batch_size}")
        config = replace(config, optim=replace(config.optim, batch_size=len(source)))
    return config, open_training_images(config, source)


def config_and_stop(command: Command, arguments: Arguments) -> tuple[Any, int | None]:
    """Parse a training's config, and after which step it stops."""
    return parse(command, arguments), split_stop(arguments)[1]


def pretrain(given: tuple[PretrainConfig, int | None]) -> dict[str, Any]:
    """Pre-train a masked autoencoder; resumes from its run folder."""
    config, stop = given
    source = open_early("pretrain", config, open_training_images)
    from mae_et.pretraining import Pretraining  # and PyTorch, after the data is open

    return _train(Pretraining(config, source), stop)


def finetune(given: tuple[downstream.ClassifierConfig, int | None]) -> dict[str, Any]:
    """Fine-tune or probe a checkpoint on labelled images."""
    check_training_data(given[0])
    return _classify("finetune", *given)


def supervised(given: tuple[downstream.ClassifierConfig, int | None]) -> dict[str, Any]:
    """Train a timm model from scratch, with or without a curriculum."""
    return _classify("supervised", *given)


def _classify(
    command: str, config: downstream.ClassifierConfig, stop: int | None
) -> dict[str, Any]:
    splits = open_early(command, config, open_splits)
    from finetune.training.classifier import Classification

    return _train(Classification(config, splits), stop)


def _train(task: Any, stop: int | None) -> dict[str, Any]:
    """Train a `Task` to its end, or to a step, and return its results."""
    from mae_et.training.session import train_run

    if stop is not None:
        say_facts(stop=f"after step {stop:,}; without --stop-after-step, the command resumes")
    train_run(task, stop)
    return results_of(task.config.output)
