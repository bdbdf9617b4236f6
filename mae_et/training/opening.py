"""Open the training images of a run, and print the first lines of what it is.

For folders of images and the published encoders this needs no PyTorch, which takes seconds to load:
mistakes in data and plan are reported before.
"""

from collections.abc import Sequence
from typing import Any

from mae_et.config.data import DataConfig
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.datasets import ImageDataset, count_unlabelled, open_dataset
from mae_et.data.layout import ROOTED
from mae_et.runtime.console import is_main, write_line
from mae_et.training.plan import curriculum_of, make_plan


def open_training_images(config: PretrainConfig) -> ImageDataset:
    """Open the training images of a pre-training, and print the first lines of its overview.

    Raises:
        UserError: the curriculum or the data cannot be used.
    """
    curriculum_of(config)  # refused before a large folder is listed
    source = open_dataset(config.data, "train", config.model.channels)
    say_opening(config, source)
    if config.init.extends is None:  # whose plan is the other run's, which may be gone
        say_plan(make_plan(config, len(source)))
    return source


def say_opening(config: Any, source: ImageDataset) -> None:
    """Print the first lines of a run's overview, on the main rank."""
    if not is_main():
        return
    curves = "tensorboard --logdir" if config.output.tensorboard else "mae-et report"
    write_line(fact_line("data", _describe_data(config.data, source)))
    write_line(fact_line("curves", f"{curves} {config.output.dir}"))


def say_plan(plan: Plan) -> None:
    """Print what a run does, on the main rank."""
    if is_main():
        write_line(fact_line("plan", _describe_plan(plan)))


def fact_line(name: str, fact: str) -> str:
    """Return a line of the overview, aligned with the others."""
    return f"{name:<8}{fact}"


def describe_sizes(bandwidths: Sequence[int]) -> str:
    """Return bandwidths, each once."""
    return " / ".join(map(str, dict.fromkeys(bandwidths))) + " px"


def _describe_plan(plan: Plan) -> str:
    sizes = describe_sizes([stage.bandwidth for stage in plan.stages])
    stages = len(plan.stages)
    return (
        f"{plan.steps:,} steps of {plan.batch_size:,} images, {stages} stage{'s' * (stages > 1)} "
        f"at {sizes}; {plan.images / plan.dataset_size:.4g} epochs of images for the compute of "
        f"{plan.equivalent_epochs:.4g}"
    )


def _describe_data(config: DataConfig, source: ImageDataset) -> str:
    kind = config.source
    where = config.root if kind in ROOTED else kind
    unlabelled = count_unlabelled(source)
    classes = len(source.classes)
    labels = f", {classes:,} classes" if classes else ""
    if unlabelled and classes:
        labels += f", {unlabelled:,} without a label"
    return f"{where}, training split: {len(source):,} images{labels or ', no labels'}"
