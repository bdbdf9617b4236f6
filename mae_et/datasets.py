"""Where images come from: folders, torchvision's sets, tar shards, Hugging Face, synthetic ones.

Every source is map-style, `source[i] -> (image, label)` with random access, for a run must be able
to go on at any sample. An image is a PIL image, or a tensor [C H W] where PIL has no mode for its
channels; a label is an integer, -1 where there is none.
"""

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mae_et.config import DataConfig
from mae_et.errors import RunFailed, UserError
from mae_et.synthetic import Synthetic

Split = Literal["train", "val"]
Sample = tuple[Image.Image | Tensor, int]

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".npy"}
)
HELD_OUT = 0.2
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Source(Protocol):
    """A map-style data set of images."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the labels; empty where there are none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def open_source(config: DataConfig, split: Split, channels: int = 3, seed: int = 0) -> Source:
    """Open a split of the data set that a config names.

    Raises:
        UserError: it is unknown, missing or empty, or cannot be downloaded.
    """
    kind = config.source
    if kind == "synthetic":
        return _synthetic(config, split, seed)
    if kind == "folder":
        return open_folder(_root(config), _split_name(config, split), split, channels)
    if kind == "wds":
        return TarShards(_root(config), _split_name(config, split), channels)
    if kind == "fashion_mnist" and config.root is None and DEBIAN_FASHION_MNIST.is_dir():
        return _fashion_mnist_from_debian(split, channels)
    if kind in _TORCHVISION:
        return _torchvision(config, split, channels)
    if kind.startswith("hfds/"):
        return _hugging_face(config, split, channels)
    known = ", ".join(["folder", "synthetic", *_TORCHVISION, "wds", "hfds/NAME"])
    raise UserError(f"data.name {kind!r} is unknown; known: {known}")


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert a PIL image to the mode that has this many channels.

    Raises:
        UserError: PIL has no such mode.
    """
    if channels not in PIL_MODES:
        raise UserError(
            f"model.channels {channels} needs arrays (.npy, [H W C]); pictures have "
            f"{', '.join(map(str, PIL_MODES))}"
        )
    return image.convert(PIL_MODES[channels])


# --- folders --------------------------------------------------------------------------------------


class Folder:
    """Files below a folder, labelled by the folder they lie in."""

    def __init__(self, files: list[Path], labels: list[int], classes: list[str], channels: int):
        self.files, self.labels, self.classes, self.channels = files, labels, classes, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path = self.files[index]
        try:
            if path.suffix.lower() == ".npy":
                return _array_image(np.load(path), self.channels), self.labels[index]
            with path.open("rb") as file, Image.open(file) as image:
                return to_channels(image, self.channels), self.labels[index]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if isinstance(error, UserError):
                raise
            raise RunFailed(f"cannot read the image {path}: {error}") from None


def open_folder(root: Path, split_name: str, split: Split, channels: int) -> Folder:
    """Open `root/SPLIT/CLASS/*`, `root/CLASS/*` or `root/*`.

    Where there is no folder of the split's name, a fifth of the files is held out as val: which, is
    a function of their names. Files that lie in no class folder are unlabelled.

    Raises:
        UserError: the folder is missing, or holds no image.
    """
    if not root.is_dir():
        raise UserError(f"data.root {root} is not a folder")
    has_splits = (root / split_name).is_dir()
    if split == "val" and not has_splits and (root / "train").is_dir():
        raise UserError(
            f"data.root {root} has a train folder but no {split_name} folder to score on"
        )
    top = root / split_name if has_splits else root
    files = list_images(top)
    if not files:
        raise UserError(f"there is no image in {top}")
    relative = [path.relative_to(top) for path in files]
    named = [path.parts[0] if len(path.parts) > 1 else None for path in relative]
    labelled = None not in named
    classes = sorted({name for name in named if name is not None}) if labelled else []
    number = {name: place for place, name in enumerate(classes)}
    labels = [number[name] if name is not None and labelled else -1 for name in named]
    chosen = range(len(files))
    if not has_splits:
        held_out = _held_out(relative, labels)
        chosen = [i for i in chosen if (i in held_out) == (split == "val")]  # type: ignore[assignment]
    return Folder([files[i] for i in chosen], [labels[i] for i in chosen], classes, channels)


def list_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, in an order that depends on their names alone."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        found += [
            Path(parent, name)
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")  # noqa: PTH122
        ]
    return found


def _held_out(relative: Sequence[Path], labels: Sequence[int]) -> set[int]:
    """Choose a fifth of each class by the hash of the name: steady when files are added."""
    by_class: dict[int, list[int]] = {}
    order = sorted(
        range(len(relative)), key=lambda i: hashlib.sha256(str(relative[i]).encode()).digest()
    )
    for i in order:
        by_class.setdefault(labels[i], []).append(i)
    return {i for members in by_class.values() for i in members[: int(len(members) * HELD_OUT)]}


def _array_image(array: np.ndarray, channels: int) -> Tensor:
    """[H W C] or [H W] -> tensor [C H W]; integers keep their type, floats become float32."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] != channels:
        raise ValueError(f"an array of shape {array.shape} is no image of {channels} channels")
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


# --- sets that others read ------------------------------------------------------------------------


class Wrapped:
    """A map-style set of (PIL image, label), brought to the channels asked for."""

    def __init__(self, inner: Any, classes: list[str], channels: int):
        self.inner, self.classes, self.channels = inner, classes, channels

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.inner[index]
        return to_channels(image, self.channels), int(label)


class Arrays(Dataset[Sample]):
    """Grey images held in memory, uint8 [N H W]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def _synthetic(config: DataConfig, split: Split, seed: int) -> Source:
    train, val = config.synthetic_train, config.synthetic_val
    # The splits are neighbouring windows of one endless set.
    length, first = (train, 0) if split == "train" else (val, train)
    return Synthetic(length, config.synthetic_size, seed=0, first=first)


def _torchvision_sets() -> dict[str, Callable[[str, Split, bool], Any]]:
    from torchvision import datasets

    def imagenette(root: str, split: Split, download: bool) -> Any:
        # torchvision refuses to download over a folder that is there.
        there = (Path(root) / "imagenette2").is_dir()
        return datasets.Imagenette(root, split, size="full", download=download and not there)

    return {
        "cifar10": lambda root, split, get: datasets.CIFAR10(root, split == "train", download=get),
        "cifar100": lambda root, split, get: datasets.CIFAR100(
            root, split == "train", download=get
        ),
        "fashion_mnist": lambda root, split, get: datasets.FashionMNIST(
            root, split == "train", download=get
        ),
        "imagenette": imagenette,
    }


_TORCHVISION = ("cifar10", "cifar100", "fashion_mnist", "imagenette")


def _torchvision(config: DataConfig, split: Split, channels: int) -> Source:
    root = config.root or Path("data") / config.source
    try:
        inner = _torchvision_sets()[config.source](str(root), split, config.download)
    except Exception as error:  # whatever a download or a half-written folder raises
        raise UserError(
            f"the data set {config.source} is neither in {root} nor to be downloaded: {error}"
        ) from None
    names = [name if isinstance(name, str) else name[0] for name in inner.classes]
    return Wrapped(inner, names, channels)


def _fashion_mnist_from_debian(split: Split, channels: int) -> Source:
    """Read the files of Debian's package dataset-fashion-mnist (IDX format, gzipped)."""
    stem = "train" if split == "train" else "t10k"
    pixels = _idx(DEBIAN_FASHION_MNIST / f"{stem}-images-idx3-ubyte.gz", 16)
    labels = _idx(DEBIAN_FASHION_MNIST / f"{stem}-labels-idx1-ubyte.gz", 8)
    return Wrapped(Arrays(pixels.reshape(-1, 28, 28), labels), list(map(str, range(10))), channels)


def _idx(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def _hugging_face(config: DataConfig, split: Split, channels: int) -> Source:
    """Open a Hugging Face data set through timm's reader (needs the extra [hf])."""
    from timm.data import create_dataset

    try:
        inner = create_dataset(
            config.source,
            root=str(config.root) if config.root else None,
            split=_split_name(config, split),
            download=config.download,
        )
    except Exception as error:
        raise UserError(f"timm cannot open {config.source}: {error}") from None
    found = getattr(inner.reader, "class_to_idx", None) or {}
    return Wrapped(inner, sorted(found, key=lambda name: found[name]), channels)


# --- tar shards -----------------------------------------------------------------------------------


class Member(NamedTuple):
    """Where an image lies in a shard."""

    shard: int
    offset: int
    size: int
    label: int


class TarShards:
    """WebDataset shards (`*.tar` with KEY.jpg and KEY.cls), read at random places.

    timm's reader of such shards streams them, which cannot go on at a given sample; the archives
    are indexed once instead, and an image is then one read at an offset.

    Raises:
        UserError: there is no shard, or no image in them.
    """

    def __init__(self, root: Path, split_name: str, channels: int):
        top = root / split_name if (root / split_name).is_dir() else root
        self.shards = sorted(top.glob("*.tar"))
        if not self.shards:
            raise UserError(f"there is no .tar shard in {top}")
        self.members = [m for number, path in enumerate(self.shards) for m in _index(number, path)]
        if not self.members:
            raise UserError(f"the shards in {top} hold no image")
        self.channels = channels
        self.classes = [str(c) for c in range(1 + max(member.label for member in self.members))]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Sample:
        member = self.members[index]
        with self.shards[member.shard].open("rb") as file:
            file.seek(member.offset)
            content = file.read(member.size)
        try:
            with Image.open(io.BytesIO(content)) as image:
                return to_channels(image, self.channels), member.label
        except OSError as error:
            raise RunFailed(
                f"cannot read an image in {self.shards[member.shard]} at {member.offset}: {error}"
            ) from None


def _index(number: int, path: Path) -> list[Member]:
    """List the images of a shard; the label of KEY.jpg is the number in KEY.cls."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                key, extension = os.path.splitext(entry.name)  # noqa: PTH122
                if extension.lower() in EXTENSIONS:
                    images[key] = (entry.offset_data, entry.size)
                elif extension == ".cls":
                    content = archive.extractfile(entry)
                    labels[key] = int(content.read()) if content else -1
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable WebDataset shard: {error}") from None
    return [Member(number, *place, labels.get(key, -1)) for key, place in images.items()]


def _root(config: DataConfig) -> Path:
    if config.root is None:
        raise UserError(f"data.root is needed for data.name {config.source}")
    return config.root


def _split_name(config: DataConfig, split: Split) -> str:
    return config.train_split if split == "train" else config.val_split
