"""WebDataset shards, read at random places, and written.

timm's reader of such shards streams them, which cannot go on at a given sample. Here the archives
are indexed once, and an image is then one read at an offset.
"""

import io
import re
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mae_et.errors import UserError
from mae_et.io.atomic import write_atomically

UNLABELLED = -1
MAX_CLASSES = 1_000_000
LONGEST_LABEL = 64


def find_shards(root: Path, split: Literal["train", "val"], train: str, val: str) -> list[Path]:
    """Find a split's shards: `root/NAME/*.tar`, or `root/*.tar` with NAME as a word in the file's.

    Shards that name no split are for training.

    Args:
        root: folder of the data set.
        split: which one.
        train: name of the training split.
        val: name of the validation split.

    Raises:
        UserError: there is none.
    """
    name = train if split == "train" else val
    found = _named(root, name)
    if not found and split == "train":
        others = _named(root, val)
        found = [path for path in sorted(root.glob("*.tar")) if path not in others]
    if not found:
        raise UserError(f"data.root {root} has no {split} shards ({name}/*.tar or *-{name}-*.tar)")
    return found


def _named(root: Path, name: str) -> list[Path]:
    if (root / name).is_dir():
        return sorted((root / name).glob("*.tar"))
    return [path for path in sorted(root.glob("*.tar")) if name in re.split(r"[\W_\d]+", path.stem)]


class TarShards:
    """The images of some shards, as bytes.

    Files of a sample share a key, which is the path up to the first dot of the file's name: the
    label of `a/b.jpg` is the number in `a/b.cls`. `a/b.mask.png` is no image: its extension is
    `.mask.png`.

    Args:
        paths: the archives.
        extensions: of images, with the dot.

    Raises:
        UserError: a shard is damaged.
    """

    def __init__(self, paths: Sequence[Path], extensions: Collection[str]):
        self.paths = list(paths)
        found = [_index(path, extensions) for path in self.paths]
        # Arrays, not lists: see ImageFiles.
        self.shards = np.repeat(np.arange(len(found)), [len(places) for places in found])
        self.places = np.concatenate(found) if found else _places([])

    def __len__(self) -> int:
        return len(self.places)

    @property
    def labels(self) -> np.ndarray:
        """Label of each image, int64 [N]."""
        return self.places[:, 2]

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        offset, size, label = map(int, self.places[index])
        with self.paths[self.shards[index]].open("rb") as file:
            file.seek(offset)
            return file.read(size), label

    def name(self, index: int) -> str:
        """Say where an image lies."""
        return f"at byte {self.places[index, 0]} of {self.paths[self.shards[index]]}"


def _index(path: Path, extensions: Collection[str]) -> np.ndarray:
    """Return the offset, size and label of each image of a shard, int64 [N 3]."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                if not entry.isreg():
                    continue
                key, extension = _key_and_extension(entry.name)
                if extension in extensions:
                    images[key] = (entry.offset_data, entry.size)
                elif extension == ".cls":
                    content = archive.extractfile(entry)
                    labels[key] = _label(content.read(LONGEST_LABEL)) if content else UNLABELLED
            _check_end(path, archive.offset)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a readable WebDataset shard: {error}") from None
    return _places([(*place, labels.get(key, UNLABELLED)) for key, place in images.items()])


def _label(content: bytes) -> int:
    """Read a label; classes are numbered from 0, so a large one would be a table of that size.

    Raises:
        ValueError: it is no number of a class.
    """
    label = int(content)
    if not UNLABELLED <= label < MAX_CLASSES:
        raise ValueError(f"the label {label} is no class (0 to {MAX_CLASSES - 1})")
    return label


def _key_and_extension(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, dot, rest = file.partition(".")
    return folder + slash + stem, (dot + rest).lower()


def _check_end(path: Path, end: int) -> None:
    """Refuse an archive in which tarfile stopped at a damaged header, as if it ended there."""
    with path.open("rb") as file:
        file.seek(end)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"it is damaged at byte {end}")


def _places(rows: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


class TarWriter:
    """A shard that is written, and put in place when it is whole."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "TarWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.path.with_name(f".{self.path.name}.part")
        self.tar = tarfile.open(self.temporary, "w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, name: str, content: bytes) -> int:
        """Add a file; return where its content begins."""
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        self.tar.addfile(entry, io.BytesIO(content))
        return self.tar.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def __exit__(self, kind: Any, *_: object) -> None:
        self.tar.close()
        if kind is None:
            write_atomically(self.path, self.temporary.replace)
        self.temporary.unlink(missing_ok=True)
