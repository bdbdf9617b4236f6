"""Commands that score checkpoints: kNN, linear probe, evaluation, learning dynamics."""

from typing import Any

import finetune
from finetune.scoring_config import DynamicsConfig, EvaluateConfig, ProbeConfig, notify_scoring
from mae_et.checkpoints.run_config import config_of_run
from mae_et.cli.arguments import config_over_data_of
from mae_et.cli.output import prints_results


@prints_results("knn", config_over_data_of)
def knn(config: ProbeConfig) -> dict[str, Any]:
    """Score an encoder by weighted k-nearest neighbours."""
    _notify_early(config)
    return finetune.knn(config)


@prints_results("linear-probe", config_over_data_of)
def linear_probe(config: ProbeConfig) -> dict[str, Any]:
    """Score an encoder by a linear classifier on its frozen features."""
    _notify_early(config)
    return finetune.linear_probe(config)


@prints_results("evaluate", config_over_data_of)
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a classifier: top-1, top-5, loss, confusion table."""
    return finetune.evaluate(config)


@prints_results("dynamics", config_over_data_of)
def dynamics(config: DynamicsConfig) -> dict[str, Any]:
    """Score a run's kept checkpoints on low-pass filtered images."""
    return finetune.dynamics(config)


def _notify_early(config: ProbeConfig) -> None:
    """Print what is scored before PyTorch is loaded (takes seconds), if the data are known."""
    run = config_of_run(config.checkpoint)
    data = config.data or (None if run is None else run.data)
    if data is not None:
        notify_scoring(config.checkpoint, data)
