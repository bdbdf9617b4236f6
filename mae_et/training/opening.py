"""Open the training images of a run, and print what it reads and where its curves are.

Nothing here imports PyTorch, which takes seconds: mistakes in the data are reported before.
"""

from typing import Any

from mae_et.config.data import DataConfig
from mae_et.config.schema import PretrainConfig
from mae_et.data.datasets import ImageDataset, count_unlabelled, open_dataset
from mae_et.runtime.console import is_main, say
from mae_et.training.plan import curriculum_of


def open_training_images(config: PretrainConfig) -> ImageDataset:
    """Open the training images of a pre-training; see `say_opening`.

    Raises:
        UserError: the curriculum or the data cannot be used.
    """
    curriculum_of(config)  # refused before a large folder is listed
    source = open_dataset(config.data, "train", config.model.channels)
    say_opening(config, source)
    return source


def say_opening(config: Any, source: ImageDataset) -> None:
    """Print the first lines of a run's overview, on the main rank."""
    if not is_main():
        return
    curves = "tensorboard --logdir" if config.output.tensorboard else "mae-et report"
    say(fact_line("data", _describe_data(config.data, source)))
    say(fact_line("curves", f"{curves} {config.output.dir}"))


def fact_line(name: str, fact: str) -> str:
    """Return a line of the overview, aligned with the others."""
    return f"{name:<8}{fact}"


def _describe_data(config: DataConfig, source: ImageDataset) -> str:
    kind = config.source
    where = config.root if kind in {"folder", "shards", "wds"} else kind
    unlabelled = count_unlabelled(source)
    classes = len(source.classes)
    labels = f", {classes:,} classes" if classes else ""
    if unlabelled and classes:
        labels += f", {unlabelled:,} without a label"
    return f"{where}, training split: {len(source):,} images{labels or ', no labels'}"
