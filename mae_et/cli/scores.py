"""Commands that score checkpoints: kNN, linear probe, evaluation, learning dynamics."""

import re
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import finetune
from finetune.scoring_config import DynamicsConfig, EvaluateConfig, ProbeConfig, notify_scoring
from mae_et.checkpoints.run_config import config_of_run
from mae_et.cli.arguments import Arguments
from mae_et.errors import listed, require
from mae_et.runtime.console import say


def for_each_run(start: Callable[[Arguments], None], arguments: Arguments) -> None:
    """Start a command on the run that is its first word for several: knn RUN1 RUN2 --key value."""
    paths = list(takewhile(lambda word: not word.startswith("-"), arguments))
    runs = [path for path in paths if Path(path, "config.yaml").is_file()]
    if len(runs) < 2:
        start(arguments)  # which says where a second path belongs
        return
    rest = arguments[len(paths) :]
    require(
        not any(re.match(r"--output(=|$)", word) for word in rest),
        "output is for one run: each of several keeps its scores in its own folder",
    )
    if others := [path for path in paths if path not in runs]:
        say(f"not scored, as they hold no run: {listed(others)}")
    for place, run in enumerate(runs):
        try:
            start([run, *rest])
        except Exception:
            if runs[place + 1 :]:
                say(f"not scored: {listed(runs[place + 1 :])}")
            raise


def knn(config: ProbeConfig) -> dict[str, Any]:
    """Score an encoder by weighted k-nearest neighbours."""
    _notify_early(config)
    return finetune.knn(config)


def linear_probe(config: ProbeConfig) -> dict[str, Any]:
    """Score an encoder by a linear classifier on its frozen features."""
    _notify_early(config)
    return finetune.linear_probe(config)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a classifier: top-1, top-5, loss, confusion table."""
    return finetune.evaluate(config)


def dynamics(config: DynamicsConfig) -> dict[str, Any]:
    """Score a run's kept checkpoints on low-pass filtered images."""
    return finetune.dynamics(config)


def _notify_early(config: ProbeConfig) -> None:
    """Print what is scored before PyTorch is loaded (takes seconds), if the data are known."""
    run = config_of_run(config.checkpoint)
    data = config.data or (None if run is None else run.data)
    if data is not None:
        notify_scoring(config.checkpoint, data)
