"""Prepared shards: a data set at several sizes, in few large files that are read at random places.

`mae-et prepare` writes, for each split:

    FOLDER/train/split.json            classes, levels, number of images and shards; written last
    FOLDER/train/00000.npy             index of shard 0: one row for each image
    FOLDER/train/00000-192.tar         its pictures of 192 pixels on the shorter side
    FOLDER/train/00000-original.tar    its files as they were

Each archive is a WebDataset by itself. A level holds the pictures that are larger than it; what has
no smaller form (small pictures, arrays, transparency, 16 bits) is read as it was. An image that
could not be read keeps its row, with no bytes at any level, so that all others keep their numbers.
"""

import os
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mae_et.data.decoding import Box, BoxSampler, DecodedDataset
from mae_et.data.untrusted import read_array
from mae_et.data.webdataset import MAX_CLASSES
from mae_et.errors import Unreadable, UserError
from mae_et.io.plain_files import read_mapping

VERSION = 1
ORIGINAL = 0
LEVEL_DETAIL = 1.25
OPEN_FILES = 256


def index_dtype(levels: int) -> np.dtype:
    """Return the type of an index row; the original comes last of the places."""
    places = (levels + 1,)
    return np.dtype(
        [
            ("offset", "<i8", places),
            ("size", "<i8", places),  # 0 where an image is not in the level
            ("crc32", "<u4", places),
            ("height", "<i4"),  # of the original; 0 where it was not measured
            ("width", "<i4"),
            ("label", "<i8"),
        ]
    )


def archive_path(folder: Path, shard: int, level: int) -> Path:
    """Return where a shard's pictures of a level lie."""
    return folder / f"{shard:05d}-{level or 'original'}.tar"


def index_path(folder: Path, shard: int) -> Path:
    """Return where a shard's index lies."""
    return folder / f"{shard:05d}.npy"


class PreparedShards:
    """The encoded images of a prepared split: `files[i] -> (bytes of the original, label)`.

    Args:
        folder: of the split.

    Raises:
        UserError: it is not prepared, not to its end, or its index is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        about = read_description(folder)
        self.classes: list[str] = about["classes"]
        self.levels = [*about["levels"], ORIGINAL]
        parts = [read_index(folder, n, len(self.levels) - 1) for n in range(about["shards"])]
        self.rows = np.concatenate(parts)
        self.shards = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        if len(self.rows) != about["images"]:
            raise UserError(
                f"{folder} is damaged: its index has {len(self.rows)} images of {about['images']}; "
                "prepare it again"
            )
        self._check_labels()
        self._open: dict[tuple[int, int], int] = {}

    def _check_labels(self) -> None:
        labels = self.labels
        # Sets without names of classes have labels all the same.
        most = len(self.classes) or MAX_CLASSES
        if len(labels) and not (labels.min() >= -1 and labels.max() < most):
            raise UserError(f"{self.folder} is damaged: a label is none of its {most} classes")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        """Label of each image, int64 [N]."""
        return self.rows["label"]

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self.read(index, len(self.levels) - 1), int(self.labels[index])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # open files belong to their process

    def read(self, index: int, place: int) -> bytes:
        """Return an image's file at a level, given by its place among the levels.

        Raises:
            Unreadable: its checksum does not match, it ends beyond the archive, or it could not be
                read when it was prepared.
        """
        row = self.rows[index]
        if not row["size"][-1]:
            number = int(index - np.searchsorted(self.shards, self.shards[index]))
            raise Unreadable(
                f"cannot read the image {number} of shard {self.shards[index]} of {self.folder}: "
                "it could not be read when it was prepared"
            )
        size, offset = int(row["size"][place]), int(row["offset"][place])
        file = self._file(index, place)
        # Memory is taken before a byte is read.
        if offset + size > os.fstat(file).st_size:
            raise Unreadable(f"{self.name(index, place)} is damaged: the archive ends before it")
        # At a position of its own: processes that were forked share the file's.
        content = os.pread(file, size, offset)
        if zlib.crc32(content) != row["crc32"][place]:
            raise Unreadable(f"{self.name(index, place)} is damaged: its checksum does not match")
        return content

    def name(self, index: int, place: int = -1) -> str:
        """Say where an image lies."""
        path = archive_path(self.folder, int(self.shards[index]), self.levels[place])
        return f"at byte {self.rows['offset'][index][place]} of {path}"

    def _file(self, index: int, place: int) -> int:
        key = (int(self.shards[index]), self.levels[place])
        if key not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[key] = os.open(archive_path(self.folder, *key), os.O_RDONLY)
        return self._open[key]


class PreparedDataset(DecodedDataset):
    """A prepared split: whole pictures from the originals, small crops from the smallest level."""

    def __init__(self, folder: Path, channels: int):
        self.files = PreparedShards(folder)
        super().__init__(self.files, self.files.classes, channels, self.files.name)

    def read_for_crop(self, index: int, draw: BoxSampler, size: int) -> tuple[Any, int, BoxSampler]:
        """Read the smallest level in which the box has enough pixels.

        The box is drawn at the original's size, so that it does not depend on the level.
        """
        files, row = self.files, self.files.rows[index]
        height, width = int(row["height"]), int(row["width"])
        if not height:
            return super().read_for_crop(index, draw, size)
        box = draw(height, width)
        side, shorter = min(box.height, box.width), min(height, width)
        sizes = row["size"].tolist()
        place = next(
            (
                place
                for place, level in enumerate(files.levels[:-1])
                if sizes[place] and side * level >= LEVEL_DETAIL * size * shorter
            ),
            len(files.levels) - 1,
        )
        content = files.read(index, place)
        return content, int(row["label"]), partial(_same_box, box, height, width)


def _same_box(box: Box, height: int, width: int, level_height: int, level_width: int) -> Box:
    return box.scaled(level_height / height, level_width / width)


def read_description(folder: Path) -> dict[str, Any]:
    """Return what `split.json` says.

    Raises:
        UserError: it is missing, or of another version.
    """
    path = folder / "split.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is no prepared split: there is no split.json in it, which mae-et prepare "
            "writes last"
        )
    about = read_mapping(path)
    try:
        if about["version"] == VERSION:
            _check_description(about)
    except (ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({type(error).__name__}: {reason})") from None
    if about["version"] != VERSION:
        raise UserError(f"{path} is of version {about['version']}, this is {VERSION}")
    return about


def _check_description(about: dict[str, Any]) -> None:
    """Refuse what is no description: levels are parts of file names, so they must be numbers.

    Raises:
        ValueError: a value is of another kind, or out of range.
        KeyError, TypeError: one is missing, or it is no mapping.
    """
    numbers = [about["images"], about["shards"], *about["levels"]]
    # A truth value is an int to Python.
    if not all(type(number) is int and 0 < number < 2**40 for number in numbers):
        raise ValueError("images, shards and levels must be positive whole numbers")
    classes = about["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes must be a list of names")


def read_index(folder: Path, shard: int, levels: int) -> np.ndarray:
    """Return a shard's index.

    Raises:
        UserError: it is missing or damaged.
    """
    path = index_path(folder, shard)
    try:
        rows = read_array(path)
        if rows.dtype != index_dtype(levels) or rows.ndim != 1:
            raise ValueError("its rows are of another kind")
        numbers = [rows[name] for name in ("offset", "size", "height", "width")]
        if any(len(rows) and each.min() < 0 for each in numbers):
            raise ValueError("it has a negative place or size")
    except (OSError, ValueError) as error:
        raise UserError(f"the index {path} is damaged ({error}): prepare it again") from None
    return rows
