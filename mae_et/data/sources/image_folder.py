"""Image folders, labelled by their class folders."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mae_et.config.data import DataConfig
from mae_et.data.images.decoding import UNLABELLED, DecodedDataset, extensions_for
from mae_et.data.layout import (
    Split,
    data_root,
    image_folders_beside,
    nested_splits,
    split_folder,
    split_name,
    subfolders,
)
from mae_et.data.sources.file_listing import (
    Listing,
    cached_listing,
    count_by_extension,
    list_folder,
)
from mae_et.data.sources.file_lists import image_lists
from mae_et.data.sources.image_files import ImageFiles
from mae_et.errors import UserError, listed, refuse_unknown_classes
from mae_et.runtime.console import notify

# Advice for a folder without images, by the extension of the files in it.
OTHER_FILES = {
    ".tar": "tar shards are read with --data.name wds",
    ".parquet": "datasets of Hugging Face are read with --data.name hfds/FOLDER",
    ".arrow": "datasets of Hugging Face are read with --data.name hfds/FOLDER",
    **dict.fromkeys((".dcm", ".nii", ".nrrd", ".mha"), "save them as 16-bit PNG or as .npy"),
    **dict.fromkeys((".zip", ".gz", ".tgz", ".7z", ".rar"), "unpack the archive"),
}
HELD_OUT_FRACTION = 0.2
"""Fraction of the training images to hold out if there is no validation split."""


def open_image_folder(
    config: DataConfig, split: Split, channels: int, own_classes: bool
) -> "ImageFolder":
    """Open `ROOT/SPLIT/CLASS/*` or `ROOT/SPLIT/*`.

    Without split folders the images are `ROOT/CLASS/*` or `ROOT/*`, and a fifth of each class, at
    least one image, is held out as val. Classes are those of the training split (of this one with
    `own_classes`), in the order of their names (0 to n-1 in numeric order). If a file lies outside
    the class folders, the whole split is unlabelled.

    Raises:
        UserError: a folder is missing or has no images, or split folders have unknown names.
        UnknownClasses: val has a class that train lacks.
    """
    folder = split_folder(config, split)
    if folder is None:
        return _open_part(config, split, channels)
    listing = _list_images(config, folder, channels)
    classes = class_names(listing.names)
    if split == "val" and not own_classes:
        train = _train_files(config, channels)
        classes = classes if train is None else class_names(train)
    labels = _label_files(listing.names, classes, folder)
    if UNLABELLED in labels:
        classes = []
    others = image_folders_beside(config, extensions_for(channels)) if split == "train" else []
    unread = [f"other folders, not read: {', '.join(others)}"] * bool(others)
    _report(config, split, folder, listing, labels, classes, *unread)
    return ImageFolder(listing.names, labels, classes, channels, folder, config.max_value)


def open_image_files(
    paths: Sequence[Path], channels: int, max_value: float | None = None
) -> "ImageFolder":
    """Open files and folders of images as one dataset without labels.

    Raises:
        UserError: a path does not exist, or a folder has no images.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"images: there is no file or folder {path}")
        found = [path] if path.is_file() else [path / name for name in list_folder(path).names]
        if not found:
            raise UserError(f"there is no image in {path}")
        files += found
    return ImageFolder(files, [UNLABELLED] * len(files), [], channels, max_value=max_value)


def _open_part(config: DataConfig, split: Split, channels: int) -> "ImageFolder":
    """Open the training images, or the held-out ones, of a root without split folders."""
    root = data_root(config)
    listing = _list_images(config, root, channels)
    nested = nested_splits(listing.names)
    if nested:
        raise UserError(
            f"data.root {root} has split folders inside of its folders ({', '.join(nested)}): give "
            f"--data.root {(root / nested[0]).parent}, or name the splits with "
            "--data.train_split and --data.val_split"
        )
    classes = class_names(listing.names)
    labels = _label_files(listing.names, classes, root)
    held_out = choose_held_out(listing.names, labels)
    chosen = [i for i in range(len(labels)) if (i in held_out) == (split == "val")]
    if not chosen:
        raise UserError(f"data.root {root} has too few images: one must be held out as val")
    files, labels = [listing.names[i] for i in chosen], [labels[i] for i in chosen]
    parted = f"no split folders, so {len(held_out)} of {len(listing.names)} are held out as val"
    parted += " (--data.train_split . trains on all)" * (split == "train" and not classes)
    _report(config, split, root, listing, labels, classes, parted)
    return ImageFolder(files, labels, classes, channels, root, config.max_value)


def _list_images(config: DataConfig, folder: Path, channels: int) -> Listing:
    extensions = extensions_for(channels)
    if all((folder / name).is_file() for name in ("recipe.json", "split.json")):
        raise UserError(
            f"{folder} holds prepared shards: give --data.name shards --data.root {folder.parent}"
        )
    listing = cached_listing(config, folder, extensions)
    if not listing.names:
        files = f": {count_by_extension(listing.skipped)}" if listing.skipped else ""
        advice = [advice for suffix, advice in OTHER_FILES.items() if suffix in listing.skipped]
        raise UserError(
            f"there is no image in {folder}{files}"
            + (f"; {advice[0]}" if advice else f" (of {channels} channels: {' '.join(extensions)})")
        )
    return listing


def _train_files(config: DataConfig, channels: int) -> list[str] | None:
    """Return the files of the training split; None if there is no such split."""
    try:
        folder = split_folder(config, "train")
    except UserError:  # a root with only a validation split
        return None
    if folder is None:
        return None
    return cached_listing(config, folder, extensions_for(channels)).names


def class_names(files: Sequence[str]) -> list[str]:
    """Return the class folders of files, sorted; none if a file lies outside them.

    Folders named 0 to n-1 are sorted by number, so that the labels are the names.
    """
    if not all("/" in file for file in files):
        return []
    names = sorted({file.partition("/")[0] for file in files})
    if set(names) == set(map(str, range(len(names)))):
        names.sort(key=int)
    return names


def _label_files(files: Sequence[str], classes: Sequence[str], folder: Path) -> list[int]:
    present = class_names(files)
    if not classes or not present:
        return [UNLABELLED] * len(files)
    refuse_unknown_classes(present, classes, f"{folder} has")
    label = {name: number for number, name in enumerate(classes)}
    return [label[file.partition("/")[0]] for file in files]


def choose_held_out(files: Sequence[str], labels: Sequence[int]) -> set[int]:
    """Return the indices of a fifth of each class to hold out, at least one if it has two or more.

    The choice depends on the hashes of names, so that it changes little when files are added.
    """
    hashes = [hashlib.sha256(os.fsencode(file)).digest() for file in files]
    by_class: dict[int, list[int]] = {}
    for i in sorted(range(len(files)), key=hashes.__getitem__):
        by_class.setdefault(labels[i], []).append(i)
    return {i for members in by_class.values() for i in members[: _held_out_count(len(members))]}


def _held_out_count(images: int) -> int:
    return max(int(images * HELD_OUT_FRACTION), min(1, images - 1))


def _report(
    config: DataConfig,
    split: Split,
    folder: Path,
    listing: Listing,
    labels: Sequence[int],
    classes: Sequence[str],
    *first: str,
) -> None:
    """Print one line, with counts, if anything about a split may surprise."""
    facts = [*first]
    if folder not in {data_root(config), data_root(config) / split_name(config, split)}:
        facts.append(f"the folder is {folder.name}")
    if list(classes) != sorted(classes):
        facts.append("classes 0 to n-1 in numeric order")
    lone = sorted(file for file in listing.names if "/" not in file)
    if lone and len(lone) < len(listing.names):
        facts.append(f"no labels, as {len(lone)} lie outside of class folders ({lone[0]})")
    if classes:
        facts += _report_folders(folder, listing.names)
    if split == "train" and (lists := image_lists(data_root(config))):
        facts.append(f"lists of images, not read: {', '.join(lists)} (--data.train_split NAME)")
    if listing.skipped:
        facts.append(count_by_extension(listing.skipped))
    if facts:
        count = f"{len(labels)} images" + (f" of {len(classes)} classes" if classes else "")
        notify(f"{split} split of {data_root(config)}: {count}; {'; '.join(facts)}")


def _report_folders(folder: Path, files: Sequence[str]) -> list[str]:
    """Describe folders that might be mistaken for classes: deeper ones, and empty ones."""
    facts = []
    deeper = next((file for file in files if file.count("/") > 1), None)
    if deeper is not None:
        facts.append(
            f"the first folder is the class, not those below ({deeper}); for classes of those "
            "below, link them into one folder: ln -s"
        )
    empty = sorted(set(subfolders(folder)) - {file.partition("/")[0] for file in files})
    if empty:
        facts.append(f"folders without images: {len(empty)} ({listed(empty, 3)})")
    return facts


class ImageFolder(DecodedDataset):
    """A dataset of image files, whose paths are absolute or relative to a folder."""

    def __init__(
        self,
        files: Sequence[str | Path],
        labels: Sequence[int],
        classes: Sequence[str],
        channels: int,
        folder: Path = Path(),
        max_value: float | None = None,
    ):
        inner = ImageFiles(files, labels, folder)
        super().__init__(inner, classes, channels, inner.path, max_value)


def classes_without_images(dataset: object) -> list[str]:
    """Return the classes of an image folder that have no images; none for other datasets."""
    if not isinstance(dataset, ImageFolder):
        return []
    present = set(np.unique(dataset.inner.labels).tolist())
    return [name for number, name in enumerate(dataset.classes) if number not in present]
