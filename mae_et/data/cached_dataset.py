"""A dataset whose decoded images lie in shared memory."""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_et.data.datasets import ImageDataset
from mae_et.data.images.decoding import Sample
from mae_et.data.shared_buffer import SharedBuffer

NOT_STORED, IMAGE, ARRAY, FLOAT_ARRAY = range(4)
DTYPES = {IMAGE: np.uint8, ARRAY: np.uint8, FLOAT_ARRAY: np.float32}


class Entry(NamedTuple):
    """Where the pixels of an image lie in the buffer."""

    kind: int = NOT_STORED
    """IMAGE [H W C], ARRAY or FLOAT_ARRAY [C H W]; NOT_STORED: read from the dataset."""
    shape: tuple[int, ...] = (0, 0, 0)
    label: int = 0
    offset: int = 0


class CachedDataset:
    """A dataset with images in a buffer, at `entries`, int64 [N 6]; others come from `source`."""

    def __init__(self, source: ImageDataset, buffer: SharedBuffer, entries: np.ndarray):
        self.source, self.buffer, self.entries = source, buffer, entries
        self.classes, self.labels, self.name = source.classes, source.labels, source.name

    @property
    def is_rgb(self) -> bool:
        """Whether the images that are stored have 3 channels of 8 bits."""
        kinds = self.entries[:, 0]
        channels = np.where(kinds == IMAGE, self.entries[:, 3], self.entries[:, 1])
        rgb = (channels == 3) & (kinds != FLOAT_ARRAY)
        return bool(rgb[kinds != NOT_STORED].all())

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        entry, pixels = self._stored(range(len(self))[index])
        if pixels is None:
            return self.source[index]
        if entry.kind == IMAGE:
            return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), entry.label
        return torch.from_numpy(pixels.copy()), entry.label

    def size(self, index: int) -> tuple[int, int] | None:
        """Return the height and width of an image of 8 bits; None if it is not stored so."""
        kind, *shape, _, _ = self.entries[index].tolist()
        if kind == IMAGE:
            return shape[0], shape[1]
        return (shape[1], shape[2]) if kind == ARRAY else None

    def rows(self, samples: np.ndarray, top: np.ndarray, height: np.ndarray) -> list[Tensor]:
        """Return some rows of images of 8 bits, [height W C] each, as uint8 [height*W*C].

        They are views of the cache, but for arrays [C H W], which are rearranged.

        Args:
            samples: indices of the images, [N].
            top: their first rows, [N].
            height: their numbers of rows, [N].
        """
        whole, entries = self.buffer.whole(), self.entries[samples]
        line = entries[:, 2] * entries[:, 3]
        start = entries[:, 5] + top * line
        rows = [whole[i:j] for i, j in np.stack([start, start + height * line], 1).tolist()]
        for n in np.flatnonzero(entries[:, 0] != IMAGE):
            _, *shape, _, offset = entries[n].tolist()
            planes = whole[offset : offset + math.prod(shape)].view(*shape)
            rows[n] = planes[:, top[n] : top[n] + height[n]].permute(1, 2, 0).flatten()
        return rows

    def _stored(self, index: int) -> tuple[Entry, np.ndarray | None]:
        kind, *shape, label, offset = self.entries[index].tolist()
        entry = Entry(kind, tuple(shape), label, offset)
        if kind == NOT_STORED:
            return entry, None
        return entry, self.buffer.read(DTYPES[kind], shape, offset)
