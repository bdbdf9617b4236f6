"""Commands that score checkpoints: kNN, linear probe, evaluation, learning dynamics."""

from pathlib import Path
from typing import Any

import finetune
from mae_et.cli.arguments import Arguments, config_over_data_of
from mae_et.cli.output import prints_results
from mae_et.errors import UserError


@prints_results
def knn(arguments: Arguments) -> dict[str, Any]:
    """Score a pre-trained encoder by weighted k-nearest neighbours."""
    config = config_over_data_of("knn", arguments)
    return finetune.knn(config)


@prints_results
def linear_probe(arguments: Arguments) -> dict[str, Any]:
    """Score a pre-trained encoder by a linear classifier on its frozen features."""
    config = config_over_data_of("linear-probe", arguments)
    return finetune.linear_probe(config)


@prints_results
def evaluate(arguments: Arguments) -> dict[str, Any]:
    """Score a fine-tuned checkpoint: top-1, top-5, loss, confusion table."""
    config = config_over_data_of("evaluate", arguments)
    _refuse_pretraining(config.checkpoint)
    return finetune.evaluate(config)


@prints_results
def dynamics(arguments: Arguments) -> dict[str, Any]:
    """Score the kept checkpoints of a run on low-passed validation images."""
    config = config_over_data_of("dynamics", arguments)
    return finetune.dynamics(config)


def _refuse_pretraining(checkpoint: Path) -> None:
    """Report the run folder of a pre-training, which has no classifier to evaluate."""
    if (checkpoint / "config.yaml").is_file() and not (checkpoint / "classes.json").is_file():
        raise UserError(
            f"{checkpoint} is a run of mae-et pretrain, which has no classifier: fine-tune it with "
            f"mae-et finetune, or score its encoder with mae-et knn or mae-et linear-probe"
        )
