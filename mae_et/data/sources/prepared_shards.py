"""Read prepared shards: a dataset at several sizes, in a few large files with random access.

`mae-et prepare` writes, for each split:

    DIR/train/split.json            classes, levels, number of images and shards; written last
    DIR/train/00000.npy             index of shard 0: one row per image, then a checksum
    DIR/train/00000-192.tar         its images, 192 pixels on the shorter side
    DIR/train/00000-original.tar    its original files

Each archive is a WebDataset by itself. A level has the images that are larger than it; images
without smaller copies (small images, arrays, transparency, 16 bits) are read from the originals. An
unreadable image keeps its row, without bytes, so that all others keep their indices.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mae_et.data.images.boxes import BoxSampler
from mae_et.data.images.decoding import DecodedDataset
from mae_et.data.sources.array_files import read_array
from mae_et.data.sources.tar_index import MAX_CLASSES
from mae_et.errors import Unreadable, UserError, one_line
from mae_et.io.seals import read_sealed

VERSION = 2
ORIGINAL = 0
LEVEL_DETAIL = 1.25
MAX_OPEN_FILES = 256


class PreparedDataset(DecodedDataset):
    """A prepared split: whole images from the originals, crops from the smallest useful level."""

    def __init__(self, folder: Path, channels: int, max_value: float | None):
        self.files = PreparedShards(folder)
        super().__init__(self.files, self.files.classes, channels, self.files.name, max_value)

    def read_for_crop(
        self, index: int, sample_box: BoxSampler, size: int
    ) -> tuple[Any, int, BoxSampler]:
        """Read the smallest level in which the box has enough pixels.

        The box is sampled at the original's size, so that it does not depend on the level.
        """
        files, row = self.files, self.files.rows[index]
        height, width = int(row["height"]), int(row["width"])
        if not height:
            return super().read_for_crop(index, sample_box, size)
        box = sample_box(height, width)
        side, shorter = min(box.height, box.width), min(height, width)
        sizes = row["size"].tolist()
        position = next(
            (
                position
                for position, level in enumerate(files.levels[:-1])
                if sizes[position] and side * level >= LEVEL_DETAIL * size * shorter
            ),
            len(files.levels) - 1,
        )
        content = files.read(index, position)
        return content, int(row["label"]), lambda h, w: box.scaled(h / height, w / width)


class PreparedShards:
    """The encoded images of a prepared split: `shards[i] -> (original bytes, label)`."""

    def __init__(self, folder: Path):
        self.folder = folder
        description = read_split_file(folder)
        self.classes: list[str] = description["classes"]
        self.levels = [*description["levels"], ORIGINAL]
        shards = [read_index(folder, n, len(self.levels) - 1) for n in range(description["shards"])]
        self.rows = np.concatenate(shards)
        self.shards = np.repeat(np.arange(len(shards)), [len(shard) for shard in shards])
        if len(self.rows) != description["images"]:
            raise UserError(
                f"{folder} is damaged: its index has {len(self.rows)} of "
                f"{description['images']} images; prepare it again"
            )
        self._check_labels()
        self._open: dict[tuple[int, int], int] = {}

    def _check_labels(self) -> None:
        labels = self.labels
        # Datasets without class names may have labels.
        count = len(self.classes) or MAX_CLASSES
        if len(labels) and not (labels.min() >= -1 and labels.max() < count):
            raise UserError(f"{self.folder} is damaged: a label lies outside its {count} classes")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        """Label of each image, int64 [N]; -1 without a label."""
        return self.rows["label"]

    def identity(self) -> Iterator[bytes]:
        """Yield the checksums, sizes and labels; see `fingerprint`."""
        yield self.rows.tobytes()

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self.read(index, len(self.levels) - 1), int(self.labels[index])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # file descriptors belong to one process

    def read(self, index: int, position: int) -> bytes:
        """Return an image's file at the level with a position in `levels`.

        Raises:
            Unreadable: the checksum does not match, the archive ends early, or the image was
                unreadable when the dataset was prepared.
        """
        row = self.rows[index]
        if not row["size"][-1]:
            number = int(index - np.searchsorted(self.shards, self.shards[index]))
            raise Unreadable(
                f"cannot read the image {number} of shard {self.shards[index]} of {self.folder}: "
                "it could not be read when it was prepared"
            )
        size, offset = int(row["size"][position]), int(row["offset"][position])
        file = self._file(index, position)
        # Checked first, because pread allocates `size` bytes before reading.
        if offset + size > os.fstat(file).st_size:
            raise Unreadable(f"{self.name(index, position)} is damaged: the archive ends before it")
        # Forked workers share the file's position, so pread does not use it.
        content = os.pread(file, size, offset)
        if zlib.crc32(content) != row["crc32"][position]:
            raise Unreadable(
                f"{self.name(index, position)} is damaged: its checksum does not match"
            )
        return content

    def name(self, index: int, position: int = -1) -> str:
        """Return the archive and offset of an image, for error messages."""
        path = archive_path(self.folder, int(self.shards[index]), self.levels[position])
        return f"at byte {self.rows['offset'][index][position]} of {path}"

    def _file(self, index: int, position: int) -> int:
        key = (int(self.shards[index]), self.levels[position])
        if key not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[key] = os.open(archive_path(self.folder, *key), os.O_RDONLY)
        return self._open[key]


# --- files of a split -----------------------------------------------------------------------------


def archive_path(folder: Path, shard: int, level: int) -> Path:
    """Return the path of a shard's archive at a level."""
    return folder / f"{shard:05d}-{level or 'original'}.tar"


def index_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard's index."""
    return folder / f"{shard:05d}.npy"


def index_dtype(levels: int) -> np.dtype:
    """Return the dtype of an index row, with fields for each level, then for the original."""
    places = (levels + 1,)
    return np.dtype(
        [
            ("offset", "<i8", places),
            ("size", "<i8", places),  # 0 if the level lacks the image
            ("crc32", "<u4", places),
            ("height", "<i4"),  # of the original; 0 if it was not measured
            ("width", "<i4"),
            ("label", "<i8"),
        ]
    )


def read_split_file(folder: Path) -> dict[str, Any]:
    """Read `split.json`; refuse one that is missing, damaged or of another version."""
    path = folder / "split.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a prepared split: it has no split.json, which mae-et prepare writes "
            "last"
        )
    description = read_sealed(path)
    try:
        if description["version"] == VERSION:
            _check_description(description)
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {one_line(error)})") from error
    if description["version"] != VERSION:
        raise UserError(f"{path} has version {description['version']}, expected {VERSION}")
    return description


def _check_description(description: dict[str, Any]) -> None:
    # Levels are parts of file names, so they must be numbers; bool is a subclass of int.
    numbers = [description["images"], description["shards"], *description["levels"]]
    if not all(type(number) is int and 0 < number < 2**40 for number in numbers):
        raise ValueError("images, shards and levels must be positive whole numbers")
    classes = description["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes must be a list of names")


def read_index(folder: Path, shard: int, levels: int) -> np.ndarray:
    """Read the index of a shard, rows of `index_dtype(levels)` [N]; refuse a damaged one."""
    path = index_path(folder, shard)
    try:
        rows = read_array(path)
        if rows.dtype != index_dtype(levels) or rows.ndim != 1:
            raise ValueError("its rows have another type")
        numbers = [rows[name] for name in ("offset", "size", "height", "width")]
        if any(len(rows) and each.min() < 0 for each in numbers):
            raise ValueError("it has a negative offset or size")
    except (OSError, ValueError) as error:
        raise UserError(f"the index {path} is damaged ({error}): prepare it again") from None
    return rows
