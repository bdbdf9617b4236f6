"""Image files as a map-style dataset of their bytes."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mae_et.io.plain_files import read_bytes

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
        return read_bytes(self.path(index), MAX_FILE_BYTES), self.labels[index]

    def identity(self) -> Iterator[bytes]:
        """Yield the names, relative to the folder, and the labels; see `fingerprint`."""
        yield self.names.tobytes()
        yield self.labels.tobytes()

    def names_in(self, root: Path | None) -> Iterator[str]:
        """Yield the path of each file, relative to a folder that it is in."""
        for path in map(self.path, range(len(self))):
            inside = root is not None and path.is_relative_to(root)
            yield (path.relative_to(root) if inside else path).as_posix()  # type: ignore[arg-type]

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.folder / os.fsdecode(self.names[index])
