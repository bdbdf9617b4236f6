"""Image files as a map-style dataset of their bytes."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MAX_FILE_BYTES = 2**31


class ImageFiles:
    """Files read as bytes, with labels: `files[i] -> (bytes, label)`."""

    def __init__(self, names: Sequence[str | Path], labels: Sequence[int], folder: Path):
        self.folder = folder
        # Arrays, not lists: reading a Python object updates its reference count, so each forked
        # worker would eventually hold its own copy of a list.
        self.names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return _read_file(self.path(index)), self.labels[index]

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.folder / os.fsdecode(self.names[index])


def _read_file(path: Path) -> bytes:
    """Return a file's bytes, without blocking if it is a pipe.

    Raises:
        OSError: the file cannot be opened or read.
        ValueError: the file is not a regular file, or is larger than `MAX_FILE_BYTES`.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is a pipe or a device, not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"its {status.st_size} bytes are more than {MAX_FILE_BYTES}")
        return file.read()
