"""Open the labelled splits that a classifier is trained and scored on."""

from collections.abc import Sequence

from finetune.config import ClassifierConfig, keys_without_effect
from mae_et.config.data import DataConfig
from mae_et.curriculum.schedule import check_batch
from mae_et.data.datasets import ImageDataset, open_dataset, why_unlabelled
from mae_et.data.evenly_spaced import drawn_evenly
from mae_et.data.layout import Split, split_name
from mae_et.data.sources.image_folder import classes_without_images
from mae_et.errors import UserError, listed, refuse_unknown_classes
from mae_et.runtime.console import notify
from mae_et.training.opening import describe_data, say_facts

Splits = tuple[ImageDataset, ImageDataset | None]
"""Training and validation split; the latter is None if the run is not evaluated."""


def open_labelled(
    data: DataConfig, split: Split, channels: int, purpose: str, own_classes: bool = False
) -> ImageDataset:
    """Open a split (see `open_dataset`), and check that its images have labels for `purpose`."""
    source = open_dataset(data, split, channels, own_classes)
    if why := why_unlabelled(source):
        if data.source == "folder" and not source.classes:
            why += f": some images are in no class folder ({split_name(data, split)}/CLASS/*)"
        raise UserError(
            f"{purpose} needs labelled images of at least two classes, and the {split} split of "
            f"{data.root or data.source} has {why}"
        )
    return source


def quick_look(source: ImageDataset, split: Split, max_images: int | None) -> Sequence[int]:
    """Return the images to score: all, or at most `max_images`, drawn evenly; say how many."""
    if max_images is None or max_images >= len(source):
        return range(len(source))
    notify(f"max_images: {max_images:,} of {len(source):,} {split} images, drawn evenly")
    return drawn_evenly(len(source), max_images)


def open_splits(config: ClassifierConfig) -> Splits:
    """Open the splits of a classifier, and print a summary of its run."""
    train = open_labelled(config.data, "train", config.model.channels, "a classifier")
    say_facts(data=describe_data(config.data, train))
    if config.lacks_recipe:
        notify(
            "fine-tuned without augmentation, mixing and layer decay; --config finetune/vit_b16, "
            "vit_s16, vit_l16 and vit_h14 are the published recipes"
        )
    if unused := keys_without_effect(config):
        notify(f"keys without effect on this training: {', '.join(unused)}")
    val = None
    if config.output.evaluate_every is not None:
        val = open_labelled(config.data, "val", config.model.channels, "a classifier")
        _check_same_classes(train, val)
    check_batch(config.optim.batch_size, len(train))  # before weights are loaded
    return train, val


def _check_same_classes(train: ImageDataset, val: ImageDataset) -> None:
    """Refuse splits whose classes differ, lack validation images, or come in another order."""
    refuse_unknown_classes(val.classes, train.classes, "the validation split has")
    of_val = set(val.classes)
    absent = [name for name in train.classes if name not in of_val]
    if empty := absent or classes_without_images(val):
        raise UserError(
            f"the validation split has no image of {listed(empty)}: add some, or move the "
            "class out of the training split"
        )
    if list(train.classes) != list(val.classes):
        raise UserError("the training and validation splits list their classes in another order")
