"""Open a dataset: folders, tar shards, prepared shards, torchvision, Hugging Face, synthetic.

Every dataset is map-style, `dataset[i] -> (image, label)` with random access, so that a run can
resume at any sample. An image is a PIL image, or a tensor [C H W] if it was stored as an array; a
label is an integer, -1 for none, and means the same class in both splits.
"""

import contextlib
import fcntl
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mae_et.config.data import DataConfig
from mae_et.config.refusals import one_sentence
from mae_et.data.images.channels import check_channels
from mae_et.data.images.decoding import UNLABELLED, DecodedDataset, Sample
from mae_et.data.images.value_range import check_image_statistics, check_range
from mae_et.data.layout import WHOLE_ROOT, Split, data_root, split_folder
from mae_et.data.sources.hugging_face import open_hugging_face
from mae_et.data.sources.image_folder import open_image_folder
from mae_et.data.sources.listed_images import open_file_list
from mae_et.data.sources.prepared_shards import PreparedDataset
from mae_et.data.sources.synthetic import Synthetic
from mae_et.data.sources.webdataset import open_shards
from mae_et.errors import ALIKE, UserError, listed, names_alike, require_choice
from mae_et.io.plain_files import no_follow
from mae_et.runtime.console import notify

TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion_mnist": "FashionMNIST",
    "imagenette": "Imagenette",
}
"""Datasets that torchvision reads and downloads, with its names of them."""


class ImageDataset(Protocol):
    """A map-style dataset of images."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes; empty without labels."""

    @property
    def labels(self) -> np.ndarray | None:
        """Label of each image, int64 [N], -1 for none; None if only its samples have them."""

    def name(self, index: int) -> object:
        """Return the name of an image, for messages."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def open_dataset(
    config: DataConfig, split: Split, channels: int = 3, own_classes: bool = False
) -> ImageDataset:
    """Open a split of a dataset.

    Surprises (names other than configured, skipped files, an unusual value range) are printed once,
    with counts. With `own_classes`, the classes of a folder or of tar shards are numbered as they
    occur in this split, instead of the training split.

    Raises:
        UserError: the dataset is unknown, missing or empty, cannot be downloaded, or cannot have
            this number of channels.
        UnknownClasses: the split has a class that the training split lacks.
    """
    require_choice(split, Split, "split")
    kind = kind_of(config)
    if (
        kind.named_splits
        and split == "val"
        and config.train_split == config.val_split != WHOLE_ROOT
    ):
        notify(
            "validation images are the training images: data.train_split and data.val_split are "
            f"both {config.val_split}"
        )
    if not kind.rooted:  # these hold images, no arrays
        check_channels(channels)
        check_image_statistics(config)
    dataset = kind.open(config, split, channels, own_classes)
    check_range(dataset, config)
    _report_classes(dataset, f"{split} split of {config.root or config.source}")
    return dataset


def _report_classes(dataset: DecodedDataset, where: str) -> None:
    names, labels = dataset.classes, dataset.labels
    if alike := names_alike(names):
        notify(f"{where}: classes have {ALIKE}: {listed(alike)}")
    absent = [] if labels is None else np.setdiff1d(np.arange(len(names)), labels).tolist()
    if absent:
        some = listed([names[number] for number in absent], 3)
        notify(f"{where}: no image of {len(absent)} of {len(names)} classes ({some})")


def count_unlabelled(dataset: ImageDataset) -> int:
    """Count the images without a label, without reading any image."""
    # torchvision's and synthetic datasets have no list of labels, but always label images.
    return 0 if dataset.labels is None else int((dataset.labels == UNLABELLED).sum())


def why_unlabelled(dataset: ImageDataset) -> str:
    """Return what keeps images from being classified, such as no classes; empty if nothing does."""
    if len(dataset.classes) < 2:
        return f"one class ({dataset.classes[0]})" if dataset.classes else "no classes"
    unlabelled = count_unlabelled(dataset)
    return f"{unlabelled} of {len(dataset)} images without a label" if unlabelled else ""


def _open_files(
    config: DataConfig, split: Split, channels: int, own_classes: bool
) -> DecodedDataset:
    place = split_folder(config, split) or data_root(config)
    opener = open_file_list if place.is_file() else open_image_folder
    return opener(config, split, channels, own_classes)


def _open_prepared(config: DataConfig, split: Split, channels: int, _: bool) -> PreparedDataset:
    return PreparedDataset(data_root(config) / split, channels, config.max_value)


def _open_synthetic(config: DataConfig, split: Split, channels: int, _: bool) -> DecodedDataset:
    train, val = config.synthetic_train, config.synthetic_val
    # The splits are adjacent ranges of one endless sequence.
    length, first = (train, 0) if split == "train" else (val, train)
    try:
        inner = Synthetic(length, config.synthetic_size, seed=0, first=first)
    except ValueError as error:
        raise UserError(f"data.synthetic_{split} and data.synthetic_size: {error}") from None
    return DecodedDataset(inner, inner.classes, channels, "{} of synthetic".format)


def _open_torchvision(config: DataConfig, split: Split, channels: int, _: bool) -> DecodedDataset:
    name, root = config.source, config.root or Path("data") / config.source
    try:
        # Read only if it exists: the folder may belong to another user.
        inner = _torchvision_dataset(name, root, split)
    except Exception as error:  # torchvision raises many types for missing or incomplete folders
        if not config.download:
            raise UserError(
                f"the dataset {name} is not in {root}, and data.download is off: "
                f"{one_sentence(error)}"
            ) from error
        inner = _download(name, root, split)
    classes = [entry if isinstance(entry, str) else entry[0] for entry in inner.classes]
    return DecodedDataset(inner, classes, channels, f"{{}} of {name}".format)


def _torchvision_dataset(name: str, root: Path, split: Split, download: bool = False) -> Any:
    from torchvision import datasets

    if name == "imagenette":
        folder = root / "imagenette2"
        if download and not folder.is_dir():
            # A partly unpacked archive would pass for the whole dataset, so unpack it elsewhere.
            with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
                datasets.Imagenette(temporary, split, size="full", download=True)
                (Path(temporary) / folder.name).rename(folder)
        return datasets.Imagenette(root, split, size="full")
    kind = getattr(datasets, TORCHVISION[name])
    return kind(root, train=split == "train", download=download)


def _download(name: str, root: Path, split: Split) -> Any:
    try:
        root.mkdir(parents=True, exist_ok=True)
        # One rank downloads; the others wait and then find the dataset.
        with open(root / ".download.lock", "a", opener=no_follow) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                return _torchvision_dataset(name, root, split, download=True)
    except Exception as error:  # urllib and torchvision raise many types
        raise UserError(
            f"the dataset {name} is not in {root} and cannot be downloaded: {one_sentence(error)}"
        ) from error


@dataclass(frozen=True)
class DatasetKind:
    """A kind of dataset."""

    open: Callable[[DataConfig, Split, int, bool], DecodedDataset]
    """Opens a split, as `open_dataset` does."""
    rooted: bool = False
    """Whether its files are found under `data.root`; they may be arrays."""
    named_splits: bool = False
    """Whether `data.train_split` and `data.val_split` name its splits."""


KINDS = {
    "folder": DatasetKind(_open_files, rooted=True, named_splits=True),
    "shards": DatasetKind(_open_prepared, rooted=True, named_splits=True),
    "synthetic": DatasetKind(_open_synthetic),
    **dict.fromkeys(TORCHVISION, DatasetKind(_open_torchvision)),
    "wds": DatasetKind(open_shards, rooted=True, named_splits=True),
    "hfds/NAME": DatasetKind(open_hugging_face, named_splits=True),
}
"""Kinds of datasets by `data.name`."""
ROOTED = tuple(name for name, kind in KINDS.items() if kind.rooted)
"""Kinds of datasets whose files are found under `data.root`."""


def kind_of(config: DataConfig) -> DatasetKind:
    """Return the kind of a config's dataset; refuse an unknown one, with a list of those known."""
    name = _name_of(config)
    if name not in KINDS:
        raise UserError(
            f"data.name {config.source!r} is unknown; known: {', '.join(KINDS)} (if it is of your "
            "own code, give --data.root FOLDER instead)"
        )
    return KINDS[name]


def is_known(config: DataConfig) -> bool:
    """Return whether a config's dataset is of a kind in `KINDS`, not of a user's code."""
    return _name_of(config) in KINDS


def _name_of(config: DataConfig) -> str:
    return "hfds/NAME" if config.source.startswith("hfds/") else config.source
