"""A feature file that is written row by row, and can be resumed after a kill.

It begins with the header of the finished file, .npy or .safetensors, so that finishing it copies
nothing. `progress.json` records how many rows are on disk; later bytes, written by a killed
process, are truncated, so a resumed file has the same bytes as an uninterrupted one.

Shapes: N images, B a batch, R its readable images; ... the shape of one image's feature.
"""

import io
import json
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.io.plain_files import no_follow
from mae_et.io.seals import read_sealed, seal

LABEL = np.dtype("<i8")


class FeatureRows:
    """Features and labels of `count` images in a folder, `features` and `labels`.

    Rows of an earlier process are kept. The type of the file is its suffix; .npy for types that are
    converted at the end.
    """

    def __init__(self, folder: Path, file_type: str, count: int, dtype: str):
        self.folder, self.is_safetensors = folder, file_type == ".safetensors"
        self.count, self.dtype = count, np.dtype(dtype).newbyteorder("<")
        self.paths = folder / "features", folder / "labels"
        self.done = 0
        """Number of rows written."""
        self.shape: tuple[int, ...] = ()
        """Shape of a row; known from the first batch on."""
        self.unreadable: list[int] = []
        """Rows of unreadable images, which are NaN."""
        self.files: list[BinaryIO] = []
        if (folder / "progress.json").exists():
            self._resume()

    def append(self, features: Tensor, labels: Tensor, readable: Tensor) -> None:
        """Append float32 features [R ...] and int64 labels [B]; unreadable images become NaN."""
        if bool((features.abs() > np.finfo(self.dtype).max).any()):
            raise UserError(f"a feature is infinite, or too large for dtype {self.dtype.name}")
        if not self.files:
            self._open(tuple(features.shape[1:]))
        rows = np.full((len(readable), *self.shape), np.nan, self.dtype)
        rows[readable.numpy()] = features.cpu().numpy()
        self.files[0].write(rows.tobytes())
        self.files[1].write(labels.numpy().astype(LABEL).tobytes())
        self.unreadable += (self.done + (~readable).nonzero().flatten()).tolist()
        self.done += len(readable)

    def save(self) -> None:
        """Flush the rows to disk, and record their number."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        progress = {"rows": self.done, "shape": self.shape, "unreadable": self.unreadable}
        write_text_atomically(self.folder / "progress.json", json.dumps(seal(progress)))

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()

    def finish(self) -> Path:
        """Complete the file, and return its path."""
        self.save()
        self.close()
        if self.is_safetensors:
            with open(self.paths[0], "r+b", opener=no_follow) as file:
                file.seek(self._start() - LABEL.itemsize * self.count)
                file.write(self.labels().tobytes())
        return self.paths[0]

    def labels(self) -> np.ndarray:
        """Return the labels of all rows, int64 [N]; -1 for images without a label."""
        return np.fromfile(self.paths[1], LABEL, self.count)

    def features(self) -> np.ndarray:
        """Return all rows, [N ...], memory-mapped."""
        return np.memmap(self.paths[0], self.dtype, "r", self._start(), (self.count, *self.shape))

    def _open(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.files = [open(path, "ab", opener=no_follow) for path in self.paths]  # noqa: SIM115
        if self.done == 0:
            for file in self.files:
                file.truncate(0)
            self.files[0].write(self._header().ljust(self._start(), b"\0"))

    def _resume(self) -> None:
        progress = read_sealed(self.folder / "progress.json")
        self.done, self.unreadable = progress["rows"], progress["unreadable"]
        self.shape = tuple(progress["shape"])
        row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        ends = self._start() + self.done * row_bytes, self.done * LABEL.itemsize
        for path, end in zip(self.paths, ends, strict=True):
            if not path.exists() or path.stat().st_size < end:
                raise UserError(f"{path} is damaged; delete {self.folder} to start again")
            with open(path, "ab", opener=no_follow) as file:
                file.truncate(end)

    def _start(self) -> int:
        """Return the offset of the first row in bytes."""
        return len(self._header()) + (LABEL.itemsize * self.count if self.is_safetensors else 0)

    def _header(self) -> bytes:
        whole = (self.count, *self.shape)
        return (
            _safetensors_header(whole, self.dtype)
            if self.is_safetensors
            else _npy_header(whole, self.dtype)
        )


def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return the header of a .npy file."""
    header = io.BytesIO()
    about = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def _safetensors_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return the header of a safetensors file of labels [N] and features [N ...]."""
    labels = LABEL.itemsize * shape[0]
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    name = {"float32": "F32", "float16": "F16"}[dtype.name]
    entries = {
        "labels": {"dtype": "I64", "shape": shape[:1], "data_offsets": [0, labels]},
        "features": {"dtype": name, "shape": shape, "data_offsets": [labels, labels + size]},
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text
