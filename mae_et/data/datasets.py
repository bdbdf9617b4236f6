"""Where images come from: folders, torchvision's sets, tar shards, Hugging Face, synthetic ones.

Every source is map-style, `source[i] -> (image, label)` with random access, for a run must be able
to go on at any sample. An image is a PIL image, or a tensor [C H W] where it was stored as an
array; a label is an integer, -1 where there is none, and means the same class in both splits.
"""

import contextlib
import fcntl
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mae_et.config.files import one_sentence
from mae_et.config.schema import DataConfig
from mae_et.data.decoding import DecodedDataset, Sample, check_channels, extensions_for
from mae_et.data.image_folder import open_image_folder
from mae_et.data.layout import Split, data_root, split_name
from mae_et.data.prepared_shards import PreparedDataset
from mae_et.data.synthetic import Synthetic
from mae_et.data.untrusted import arrays_only
from mae_et.data.webdataset import UNLABELLED, TarShards, find_shards
from mae_et.errors import UserError

TORCHVISION = ("cifar10", "cifar100", "fashion_mnist", "imagenette")


class ImageDataset(Protocol):
    """A map-style data set of images."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the labels; empty where there are none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def open_dataset(config: DataConfig, split: Split, channels: int = 3) -> ImageDataset:
    """Open a split of the data set that a config names.

    Raises:
        UserError: it is unknown, missing or empty, cannot be downloaded, or has no images of so
            many channels.
    """
    kind = config.source
    if kind == "folder":
        return open_image_folder(config, split, channels)
    if kind == "shards":
        return PreparedDataset(data_root(config) / split, channels)
    if kind == "wds":
        return _tar_shards(config, split, channels)
    check_channels(channels)  # of pictures; folders and shards may hold arrays
    if kind == "synthetic":
        return _synthetic(config, split, channels)
    if kind in TORCHVISION:
        return _torchvision(config, split, channels)
    if kind.startswith("hfds/"):
        return _hugging_face(config, split, channels)
    known = ", ".join(["folder", "shards", "synthetic", *TORCHVISION, "wds", "hfds/NAME"])
    raise UserError(f"data.name {kind!r} is unknown; known: {known}")


def count_unlabelled(source: ImageDataset) -> int:
    """Return how many images of a source have no label; the images are not read."""
    labels = getattr(getattr(source, "inner", None), "labels", None)
    # torchvision's sets, and synthetic ones, say no labels beforehand, and always have them.
    return 0 if labels is None else int((np.asarray(labels) == UNLABELLED).sum())


# --- tar shards -----------------------------------------------------------------------------------


def _tar_shards(config: DataConfig, split: Split, channels: int) -> ImageDataset:
    extensions = extensions_for(channels)
    paths = find_shards(data_root(config), split, config.train_split, config.val_split)
    shards = TarShards(paths, extensions)
    if not len(shards):
        raise UserError(
            f"the {split} shards in {config.root} hold no image of {channels} channels: names must "
            f"read KEY{extensions[0]}, without a dot in KEY (extensions: {' '.join(extensions)})"
        )
    classes = [str(i) for i in range(1 + max(shards.labels))]
    return DecodedDataset(shards, classes, channels, shards.name)


# --- sets that others read ------------------------------------------------------------------------


def _wrap(inner: Any, classes: Sequence[str], channels: int, title: str) -> ImageDataset:
    return DecodedDataset(inner, classes, channels, f"{{}} of {title}".format)


def _synthetic(config: DataConfig, split: Split, channels: int) -> ImageDataset:
    train, val = config.synthetic_train, config.synthetic_val
    # The splits are neighbouring windows of one endless set.
    length, first = (train, 0) if split == "train" else (val, train)
    try:
        inner = Synthetic(length, config.synthetic_size, seed=0, first=first)
    except ValueError as error:
        raise UserError(f"data.synthetic_{split} and data.synthetic_size: {error}") from None
    return _wrap(inner, inner.classes, channels, config.source)


def _torchvision(config: DataConfig, split: Split, channels: int) -> ImageDataset:
    name, root = config.source, config.root or Path("data") / config.source
    try:
        # A set that is there is only read: its folder may belong to somebody else.
        inner = _torchvision_set(name, root, split)
    except Exception as error:  # whatever a missing or half-written folder raises
        if not config.download:
            raise UserError(
                f"the data set {name} is not in {root}, and data.download is off: "
                f"{one_sentence(error)}"
            ) from None
        inner = _download(name, root, split)
    classes = [entry if isinstance(entry, str) else entry[0] for entry in inner.classes]
    return _wrap(inner, classes, channels, name)


def _torchvision_set(name: str, root: Path, split: Split, download: bool = False) -> Any:
    from torchvision import datasets
    from torchvision.datasets import cifar

    if name == "imagenette":
        there = root / "imagenette2"
        if download and not there.is_dir():
            # An archive half unpacked would pass for the whole set, so it is unpacked elsewhere.
            with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
                datasets.Imagenette(folder, split, size="full", download=True)
                (Path(folder) / there.name).rename(there)
        return datasets.Imagenette(root, split, size="full")
    kinds = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "fashion_mnist": datasets.FashionMNIST,
    }
    # It compares checksums before it unpickles; what it unpickles with need not trust them.
    with arrays_only(cifar):
        return kinds[name](root, train=split == "train", download=download)


def _download(name: str, root: Path, split: Split) -> Any:
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Of processes that train together one downloads, and the others then find it done.
        with (root / ".download.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                return _torchvision_set(name, root, split, download=True)
    except Exception as error:  # whatever a failing download raises
        raise UserError(
            f"the data set {name} is not in {root} and cannot be downloaded: {one_sentence(error)}"
        ) from None


class HuggingFaceImages:
    """A Hugging Face data set as timm's reader opens it: columns `image` and, if any, `label`.

    The reader is used without timm's data set around it, which would put another sample in the
    place of one that cannot be read.
    """

    def __init__(self, reader: Any):
        self.rows = reader.dataset
        # Where there is no column `image`, the reader may have made one of nothing.
        if not len(self.rows) or self.rows[0].get("image") is None:
            others = [name for name in self.rows.column_names if name != "image"]
            raise ValueError(f"no column image holds images; other columns: {', '.join(others)}")
        self.classes = sorted(reader.class_to_idx, key=lambda name: reader.class_to_idx[name])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        row = self.rows[index]
        content = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
        return content, self._label(row.get("label"))

    @property
    def labels(self) -> np.ndarray:
        """Label of each image, int64 [N]: the column is read, and no image."""
        found = self.rows["label"][:] if self.classes else [None] * len(self)
        return np.fromiter(map(self._label, found), np.int64, len(self))

    def _label(self, found: Any) -> int:
        return found if self.classes and isinstance(found, int) else UNLABELLED


def _hugging_face(config: DataConfig, split: Split, channels: int) -> ImageDataset:
    """Open `hfds/NAME` of the hub, or `hfds/FOLDER` of any folder that `datasets` understands."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"data.name {config.source} needs the extra hf: pip install '.[hf]' (in the clone)"
        )
    from timm.data.readers.reader_hfds import ReaderHfds

    def open_split(name: str) -> HuggingFaceImages:
        root = str(config.root) if config.root else None
        return HuggingFaceImages(ReaderHfds(config.source.removeprefix("hfds/"), root, name))

    name = split_name(config, split)
    try:
        try:
            inner = open_split(name)
        except ValueError:
            if name != "val":
                raise
            inner = open_split("validation")  # what val is mostly called there
    except Exception as error:  # whatever an unknown set, a failing download or its files raise
        raise UserError(
            f"the {split} split of {config.source} cannot be opened (data.{split}_split {name}): "
            f"{one_sentence(error)}"
        ) from None
    return _wrap(inner, inner.classes, channels, config.source)
