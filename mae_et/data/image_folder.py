"""Folders of images, labelled by the folder that they lie in."""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mae_et.config.schema import DataConfig
from mae_et.data.decoding import DecodedDataset, extensions_for
from mae_et.data.layout import EXTENSIONS, Split, data_root, split_name
from mae_et.data.untrusted import read_array
from mae_et.data.webdataset import UNLABELLED
from mae_et.errors import UserError
from mae_et.io.atomic import write_atomically

HELD_OUT = 0.2
MAX_FILE_BYTES = 2**31
"""Of one image file."""


class ImageFiles:
    """Files read as bytes, with a label each; their names are relative to `top`."""

    def __init__(self, names: Sequence[str | Path], labels: Sequence[int], top: Path):
        self.top = top
        # Arrays, not lists: they are small, and worker processes share them. Of a list each worker
        # would in time own a copy, because reading a Python object counts its references.
        self.names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return _read_file(self.path(index)), self.labels[index]

    def path(self, index: int) -> Path:
        """Return where a file lies."""
        return self.top / os.fsdecode(self.names[index])


def _read_file(path: Path) -> bytes:
    """Return a file's bytes; what is called an image may be a pipe, on which reading would wait.

    Raises:
        OSError: it cannot be opened or read.
        ValueError: it is no file, or larger than `MAX_FILE_BYTES`.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is a pipe or a device, no file")
        if about.st_size > MAX_FILE_BYTES:
            raise ValueError(f"its {about.st_size} bytes are more than {MAX_FILE_BYTES}")
        return file.read()


class ImageFolder(DecodedDataset):
    """Image files, with a label each."""

    def __init__(
        self,
        files: Sequence[str | Path],
        labels: Sequence[int],
        classes: Sequence[str],
        channels: int,
        top: Path = Path(),
    ):
        inner = ImageFiles(files, labels, top)
        super().__init__(inner, classes, channels, inner.path)


def open_image_folder(config: DataConfig, split: Split, channels: int) -> ImageFolder:
    """Open `root/SPLIT/CLASS/*` or `root/SPLIT/*`.

    Where there are no split folders, the images are `root/CLASS/*` or `root/*`, and a fifth of each
    class is held out as val. Classes are numbered as in the training split; if a file of a split
    lies in no class folder, all of the split are unlabelled.

    Raises:
        UserError: a folder is missing or holds no image, or val has a class that train lacks.
    """
    root, name = data_root(config), split_name(config, split)
    train, top = root / config.train_split, root / name
    if not train.is_dir() and not (root / config.val_split).is_dir() and name == split:
        return _part_of_folder(config, root, split, channels)
    if not top.is_dir():
        raise UserError(f"data.root {root} has no {split} split: there is no folder {name} in it")
    files = _some_images(config, top, channels)
    others = (
        _listing(config, train, extensions_for(channels))
        if split == "val" and train.is_dir()
        else []
    )
    classes = _classes(others or files)
    labels = _labels(files, classes, top)
    return ImageFolder(files, labels, [] if UNLABELLED in labels else classes, channels, top)


def classes_without_images(source: object) -> list[str]:
    """Return the classes of a folder that none of its images belongs to; none of other sources."""
    if not isinstance(source, ImageFolder):
        return []
    present = set(np.unique(source.inner.labels).tolist())
    return [name for number, name in enumerate(source.classes) if number not in present]


def _part_of_folder(config: DataConfig, root: Path, split: Split, channels: int) -> ImageFolder:
    files = _some_images(config, root, channels)
    classes = _classes(files)
    labels = _labels(files, classes, root)
    held_out = _held_out(files, labels)
    chosen = [i for i in range(len(files)) if (i in held_out) == (split == "val")]
    if not chosen:
        raise UserError(f"data.root {root} has too few images for a fifth to be held out as val")
    return ImageFolder(
        [files[i] for i in chosen], [labels[i] for i in chosen], classes, channels, root
    )


def list_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, in an order that depends on their names alone."""
    return [folder / name for name in image_names(folder)]


def image_names(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Return the image files below a folder, relative to it, in the order of their names.

    Raises:
        UserError: a folder cannot be listed.
    """
    try:
        return list(_walk(str(folder), "", (), extensions))
    except OSError as error:
        raise UserError(f"cannot list the folder {error.filename}: {error.strerror}") from None


def _walk(
    folder: str, prefix: str, above: tuple[str, ...], extensions: tuple[str, ...]
) -> Iterator[str]:
    here = os.path.realpath(folder)
    if here in above:  # a link to a folder that it lies in
        return
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):  # .git, .thumbnails, ._photo.jpg
            continue
        if _is_folder(entry):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, here), extensions)
        elif entry.name.lower().endswith(extensions):
            yield prefix + entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: unreadable, as a file is
        return False


def _listing(config: DataConfig, folder: Path, extensions: tuple[str, ...]) -> list[str]:
    """List a folder's images, or read the listing that an earlier run kept."""
    if config.listing is None:
        return image_names(folder, extensions)
    key = hashlib.sha256(f"{folder.resolve()}\0{extensions}".encode()).hexdigest()[:16]
    kept = config.listing / f"{key}.npy"
    if kept.is_file():
        try:
            return _checked_names(read_array(kept))
        except (OSError, ValueError) as error:
            raise UserError(f"the listing {kept} is damaged ({error}): delete it") from None
    files = image_names(folder, extensions)
    array = np.array([os.fsencode(name) for name in files], dtype=np.bytes_)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    write_atomically(kept, write)
    return files


def _checked_names(array: np.ndarray) -> list[str]:
    """Return the names of a listing, all of which lie below its folder.

    Raises:
        ValueError: it holds something else.
    """
    if array.ndim != 1 or (array.dtype.kind != "S" and array.size):
        raise ValueError("it is no list of names")
    names = [os.fsdecode(name) for name in array.tolist()]
    for name in names:
        # Links below the folder are followed, as they are when it is walked.
        if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise ValueError(f"{name!r} lies outside of the folder")
    return names


def _some_images(config: DataConfig, folder: Path, channels: int) -> list[str]:
    extensions = extensions_for(channels)
    files = _listing(config, folder, extensions)
    if not files:
        raise UserError(
            f"there is no image in {folder} (of {channels} channels: {' '.join(extensions)})"
        )
    return files


def _classes(files: Sequence[str]) -> list[str]:
    """Return the names of the class folders, none if a file lies in no folder."""
    if not all("/" in file for file in files):
        return []
    return sorted({file.partition("/")[0] for file in files})


def _labels(files: Sequence[str], classes: Sequence[str], top: Path) -> list[int]:
    own = _classes(files)
    if not classes or not own:
        return [UNLABELLED] * len(files)
    unknown = sorted(set(own) - set(classes))
    if unknown:
        raise UserError(f"{top} has classes that the training split lacks: {', '.join(unknown)}")
    number = {name: place for place, name in enumerate(classes)}
    return [number[file.partition("/")[0]] for file in files]


def _held_out(files: Sequence[str], labels: Sequence[int]) -> set[int]:
    """Choose a fifth of each class by the hash of the name: steady when files are added."""
    hashes = [hashlib.sha256(os.fsencode(file)).digest() for file in files]
    by_class: dict[int, list[int]] = {}
    for i in sorted(range(len(files)), key=hashes.__getitem__):
        by_class.setdefault(labels[i], []).append(i)
    return {i for members in by_class.values() for i in members[: int(len(members) * HELD_OUT)]}
