"""Read images in loader processes without decoding or resizing them, which a device does.

A sample is a JPEG's bytes with the box, flip and mask noise that `TrainDataset` would apply: they
are drawn in the same way from the same (seed, epoch, sample), and need only the size of the image,
which is in its header. Images in memory (`data.cache`) stay there. For files that are not JPEGs for
a GPU (see `jpeg_header`), and for substitutes of unreadable images, the dataset makes finished
views.

A micro-batch leaves its process as one buffer of all contents and a few small arrays, which are
pickled: for a tensor, processes would exchange a file descriptor, in several turns.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from mae_et.data.batch import NOT_REPLACED
from mae_et.data.cached_dataset import CachedDataset
from mae_et.data.images.boxes import Box, BoxSampler, PixelBox
from mae_et.data.images.decoding import DecodedDataset
from mae_et.data.images.jpeg_crop import round_box
from mae_et.data.images.jpeg_header import APP_UNUSED, JpegHeader, read_header
from mae_et.data.sampler import SampleIndex
from mae_et.data.train_dataset import TrainDataset
from mae_et.errors import RunFailed

MAX_DEVICE_PIXELS = 2**25
"""Largest image decoded on the device, to 100 MB; loader processes decode larger ones."""


class EncodedView(NamedTuple):
    """A JPEG, or an image in memory, and the random view to make of it."""

    content: np.ndarray
    """A file, uint8 [bytes]; empty for an image in memory."""
    header: JpegHeader
    """Of the file, or the size of the image in memory."""
    box: PixelBox
    flip: bool
    noise: Tensor
    """float32 [N]."""
    sample_index: SampleIndex


class FinishedView(NamedTuple):
    """A view made by a loader process, of a file that the device does not decode."""

    image: Tensor
    """uint8 [C S S]."""
    noise: Tensor
    """float32 [N]."""
    replaced: Tensor
    """See `Batch`."""
    sample_index: SampleIndex


class FilePlace(NamedTuple):
    """Where an `EncodedView` lies in a packed batch, and the view to make of it."""

    place: int
    """Index in the batch."""
    length: int
    """Bytes of the content; those of `PackedBatch.content` are adjacent."""
    height: int
    width: int
    """Size of the image in pixels, before EXIF rotation."""
    box: PixelBox
    flip: bool


class PackedBatch(NamedTuple):
    """A micro-batch on its way to a decoder: of its B images, F are files and B - F views."""

    content: Tensor
    """uint8 [bytes]: all contents, concatenated."""
    files: np.ndarray
    """int64 [F 9]: one row per file, the numbers of `FilePlace`."""
    views: Tensor
    """uint8 [B-F C S S]: finished views, in order; empty if there are none."""
    indices: np.ndarray
    """int64 [B 3]: the sample indices."""
    noise: np.ndarray
    stage: np.ndarray
    replaced: np.ndarray
    """See `Batch`."""

    def file_places(self) -> list[FilePlace]:
        """Return the rows of `files`."""
        return [
            FilePlace(place, length, height, width, (top, left, h, w), bool(flip))
            for place, length, height, width, top, left, h, w, flip in self.files.tolist()
        ]


class EncodedDataset(Dataset[Any]):
    """The samples of a `TrainDataset`: files where possible, otherwise its views.

    Images have 3 channels and no RandAugment. `views` is the dataset, or a wrapper that substitutes
    unreadable images.
    """

    def __init__(self, dataset: TrainDataset, views: Any, cpu_sides: tuple[int, ...] = ()):
        self.dataset, self.views, self.cpu_sides = dataset, views, cpu_sides

    def __getitem__(self, index: SampleIndex) -> EncodedView | FinishedView:
        """Read a file, or make its view."""
        if self.dataset.sides[index.stage] not in self.cpu_sides:
            # Whatever the error, making the view reports or replaces the image.
            with contextlib.suppress(Exception):
                encoded = read_encoded(self.dataset, index)
                if encoded is not None:
                    return encoded
        view = self.views[index]
        if view.images.dtype != torch.uint8:
            raise RunFailed("efficiency.decode gpu needs 8-bit images, but the data are arrays")
        return FinishedView(view.images, view.noise, view.replaced, index)

    @staticmethod
    def collate(samples: Sequence[EncodedView | FinishedView]) -> PackedBatch:
        """Pack samples of one stage."""
        files = [(i, each) for i, each in enumerate(samples) if isinstance(each, EncodedView)]
        views = [each.image for each in samples if isinstance(each, FinishedView)]
        rows = [
            (i, each.content.nbytes, each.header.height, each.header.width, *each.box, each.flip)
            for i, each in files
        ]
        indices = np.array([each.sample_index for each in samples])
        replaced = [getattr(each, "replaced", NOT_REPLACED) for each in samples]
        return PackedBatch(
            _joined([each for _, each in files]),
            np.array(rows, dtype=np.int64).reshape(-1, 9),
            torch.stack(views) if views else torch.empty(0, dtype=torch.uint8),
            indices,
            torch.stack([each.noise for each in samples]).numpy(),
            indices[:, 2].copy(),
            torch.stack(replaced).numpy(),
        )


def read_encoded(dataset: TrainDataset, index: SampleIndex) -> EncodedView | None:
    """Read a sample and draw its view; None if the device cannot make it."""
    source = dataset.source
    if isinstance(source, CachedDataset):
        shape = source.size(index.sample)
        if shape is None or math.prod(shape) > MAX_DEVICE_PIXELS:
            return None
        box, flip, noise = dataset.draw_view(index, *shape)
        empty, whole_box = np.empty(0, np.uint8), round_box(box, *shape)
        return EncodedView(empty, JpegHeader(*shape, ()), whole_box, flip, noise, index)
    assert isinstance(source, DecodedDataset)

    def sample_box(height: int, width: int) -> Box:
        return dataset.draw_view(index, height, width)[0]

    box_in: BoxSampler | None = None
    if dataset.decodes_crops:
        side = dataset.sides[index.stage]
        content, _, box_in = source.read_for_crop(index.sample, sample_box, side)
    else:
        content, _ = source.inner[index.sample]
    header = read_header(content) if isinstance(content, bytes) else None
    if header is None or header.height * header.width > MAX_DEVICE_PIXELS:
        return None
    size = header.height, header.width
    box, flip, noise = dataset.draw_view(index, *size)
    pixel_box = round_box(box_in(*size) if box_in else box, *size)
    return EncodedView(np.frombuffer(content, np.uint8), header, pixel_box, flip, noise, index)


def _joined(views: Sequence[EncodedView]) -> Tensor:
    """Concatenate contents, and hide EXIF segments, because some decoders apply their rotation."""
    joined = _buffer(sum(view.content.nbytes for view in views))
    buffer, start = joined.numpy(), 0
    for view in views:
        end = start + view.content.nbytes
        buffer[start:end] = view.content
        for position in view.header.exif:
            buffer[start + position] = APP_UNUSED
        start = end
    return joined


def _buffer(size: int) -> Tensor:
    """Return uint8 [size], in a loader process in memory shared with the process that trains."""
    if not size or get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    # As in torch's collate function: otherwise the queue would copy it there.
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
