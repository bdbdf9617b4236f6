"""The labelled images of a classifier: what it is trained on, and what it is scored on."""

from dataclasses import dataclass

from finetune.config import ClassifierConfig
from mae_et.datasets import Source, open_source
from mae_et.errors import UserError
from mae_et.folders import classes_without_images


@dataclass(frozen=True)
class Data:
    """The two splits."""

    train: Source
    val: Source | None
    """None where nothing is evaluated."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.train.classes)


def open_data(config: ClassifierConfig) -> Data:
    """Open both splits, or the training split alone where nothing is evaluated.

    Raises:
        UserError: there are no labels, or the splits differ in their classes.
    """
    train = open_source(config.data, "train", config.model.channels)
    if len(train.classes) < 2:
        raise UserError("a classifier needs labelled images: folders of at least two classes")
    if config.output.evaluate_every is None:
        return Data(train, None)
    val = open_source(config.data, "val", config.model.channels)
    if list(train.classes) != list(val.classes):
        raise UserError("the training and validation splits differ in their classes")
    empty = classes_without_images(val)
    if empty:
        raise UserError(f"the validation split has no image of {', '.join(empty[:5])}")
    return Data(train, val)
