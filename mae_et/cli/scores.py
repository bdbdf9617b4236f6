"""Commands that score or show a checkpoint: kNN, linear probe, evaluation, reconstructions."""

from pathlib import Path
from typing import Any

import finetune
from finetune.scoring_config import DynamicsConfig
from mae_et.cli.arguments import Arguments, config_of, config_over_data_of
from mae_et.cli.output import print_json, print_results, split_json_flag
from mae_et.config.data import DataConfig
from mae_et.errors import UserError
from mae_et.runtime.console import say


def knn(arguments: Arguments) -> None:
    """Score a pre-trained encoder by weighted k-nearest neighbours."""
    arguments, as_json = split_json_flag(arguments)
    config = config_over_data_of("knn", read_data, arguments)
    print_results(finetune.knn(config), as_json)


def linear_probe(arguments: Arguments) -> None:
    """Score a pre-trained encoder by a linear classifier on its frozen features."""
    arguments, as_json = split_json_flag(arguments)
    config = config_over_data_of("linear-probe", read_data, arguments)
    print_results(finetune.linear_probe(config), as_json)


def evaluate(arguments: Arguments) -> None:
    """Score a fine-tuned checkpoint: top-1, top-5, loss, confusion table."""
    arguments, as_json = split_json_flag(arguments)
    config = config_over_data_of("evaluate", read_data, arguments)
    _refuse_pretraining(config.checkpoint)
    print_results(finetune.evaluate(config), as_json)


def dynamics(arguments: Arguments) -> None:
    """Score the kept checkpoints of a run on low-passed validation images."""
    config = config_over_data_of("dynamics", read_data, arguments)
    print_json(finetune.dynamics(config))


def reconstruct(arguments: Arguments) -> None:
    """Write a PNG of images: masked, reconstructed and pasted."""
    config = config_of("reconstruct", arguments)
    from mae_et.reconstruction import reconstruct

    print_json({"image": str(reconstruct(config))})


def read_data(config: Any) -> DataConfig | None:
    """Return the data, or at least the statistics, that a checkpoint was trained with."""
    from mae_et.checkpoints.load import stored_data

    path = config.run if isinstance(config, DynamicsConfig) else config.checkpoint
    run = finetune.read_classifier_config(path)
    if run is not None:
        return run.data
    key, named = getattr(config, "checkpoint_key", None), getattr(config, "architecture", None)
    data = stored_data(path, key, named)
    if named is not None and data is not None:
        say(
            f"mae-et: images as timm publishes for {named}, unless given: data.mean "
            f"{list(data.mean)}, data.std {list(data.std)}, data.eval_crop {data.eval_crop}"
        )
    return data


def _refuse_pretraining(checkpoint: Path) -> None:
    """Report the run folder of a pre-training, which has no classifier to evaluate."""
    if (checkpoint / "config.yaml").is_file() and not (checkpoint / "classes.json").is_file():
        raise UserError(
            f"{checkpoint} is a run of mae-et pretrain, which has no classifier: fine-tune it with "
            f"mae-et finetune, or score its encoder with mae-et knn or mae-et linear-probe"
        )
