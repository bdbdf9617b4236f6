"""Open the image files that a list names."""

from pathlib import Path

from mae_et.config.data import DataConfig
from mae_et.data.images.decoding import UNLABELLED
from mae_et.data.layout import Split, data_root, split_folder
from mae_et.data.sources.file_lists import check_files, image_lists, read_file_list, read_list_text
from mae_et.data.sources.image_folder import ImageFolder, choose_held_out
from mae_et.errors import UserError, refuse_unknown_classes
from mae_et.runtime.console import notify

CLASSES = "classes.txt"
"""File beside a list that orders its classes, one a line."""


def open_file_list(
    config: DataConfig, split: Split, channels: int, own_classes: bool
) -> ImageFolder:
    """Open a split that a file lists; of a root that is a list, a fifth is held out as val.

    Classes are those of the training split's list (of this one with `own_classes`), or those of
    `CLASSES` beside it, in its order.

    Raises:
        UserError: the list cannot be read, has no images, or names files that are not there.
        UnknownClasses: val has a class that train lacks.
    """
    place = split_folder(config, split)
    path = place or data_root(config)
    files = read_file_list(path)
    named, facts = files.classes, files.facts  # what the labels say
    train = None if place is None or split == "train" or own_classes else _training_list(config)
    if train is not None:
        named = read_file_list(train).classes
    classes = named
    ordered = path.parent / CLASSES
    if named and ordered.is_file():
        lines = read_list_text(ordered).splitlines()
        classes = [line.strip() for line in lines if line.strip()]
        numbers = [str(number) for number in range(len(classes))]
        known = classes if set(named) <= set(classes) else numbers
        refuse_unknown_classes(named, known, f"{path} (by {CLASSES}) has")
        named, facts = known, [*facts, f"classes in the order of {CLASSES}"]
    refuse_unknown_classes(filter(None, files.labels if named else []), named, f"{path} has")
    number = {label: index for index, label in enumerate(named)}
    labels = [number.get(label, UNLABELLED) for label in files.labels]
    check_files(path, files.names)
    chosen = list(range(len(labels)))
    if place is None:
        held_out = choose_held_out(files.names, labels)
        chosen = [i for i in chosen if (i in held_out) == (split == "val")]
        facts = [f"{len(held_out)} of {len(labels)} are held out as val", *facts]
        others = [name for name in image_lists(path.parent) if name != path.name]
        facts += [f"{name} beside it is not read" for name in others]
    if not chosen:
        raise UserError(f"{path} has too few images: one must be held out as val")
    if facts:
        count = f"{len(chosen)} images" + (f" of {len(classes)} classes" if classes else "")
        notify(f"{split} split of {path}: {count}; {'; '.join(facts)}")
    names, labels = [files.names[i] for i in chosen], [labels[i] for i in chosen]
    return ImageFolder(names, labels, classes, channels, path.parent, config.max_value)


def _training_list(config: DataConfig) -> Path | None:
    try:
        place = split_folder(config, "train")
    except UserError:  # a root with only a validation split
        return None
    return place if place is not None and place.is_file() else None
