"""Decode a dataset once, into memory shared by loader processes and ranks (`data.cache: ram`).

Images are stored as the dataset yields them: whole, in 8 bits (arrays of other types as float32),
so views equal those without a cache bit for bit. An image of 500 x 375 pixels takes 0.56 MB:
ImageNet would take 720 GB.

On each machine the first rank decodes, with the loader processes of all its ranks, and the others
read its memory. Unreadable images are not stored: they are read, and reported or replaced, when
they are trained on.
"""

import multiprocessing
import time
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mae_et.config.schema import RunConfig
from mae_et.data.cached_dataset import ARRAY, FLOAT_ARRAY, IMAGE, NOT_STORED, CachedDataset, Entry
from mae_et.data.cores import worker_count
from mae_et.data.datasets import ImageDataset
from mae_et.data.evenly_spaced import evenly_spaced
from mae_et.data.loader import batches_of, check_shared_memory, data_loader
from mae_et.data.shared_buffer import SharedBuffer
from mae_et.runtime import distributed
from mae_et.runtime.console import say
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.host_memory import available_host_memory
from mae_et.runtime.placement import node_id
from mae_et.runtime.watchdog import heartbeat

MEMORY_FRACTION = 0.8
"""Fraction of the memory available at the start that the cache may take."""
PROBED = 32
"""Images decoded to estimate the size of all."""
ROWS_AT_ONCE = 32
ROUND_SECONDS = 1.0
"""Interval at which a decoding rank signals progress to the ranks that wait for it."""
NO_BUFFER = [-1] * 4
"""Address that a rank without a `SharedBuffer` sends."""
COLUMNS = 6
"""Columns of an entry: kind, three sides, label and offset."""


def cache_images(
    source: ImageDataset, config: RunConfig, world: DistributedContext
) -> ImageDataset:
    """Return a dataset with its images in memory, or unchanged without `data.cache`.

    One line on stderr reports what was stored, or that the images do not fit and are read from
    files. Every rank must call this.
    """
    if config.data.cache == "none":
        return source
    machines = distributed.all_gather(torch.tensor(node_id()), world).tolist()
    here = [rank for rank, machine in enumerate(machines) if machine == machines[world.rank]]
    made = None
    if world.rank == here[0]:
        requested = config.efficiency.num_workers
        num_workers = worker_count(None if requested is None else requested * len(here))
        made = _decode_all(source, num_workers, world)
    while distributed.any_rank(False, world):  # one collective per round, as in `_decode_all`
        heartbeat()
    holder = torch.tensor(NO_BUFFER if made is None else made.buffer.address())
    address = distributed.all_gather(holder, world)[here[0]].tolist()
    if world.rank != here[0] and address != NO_BUFFER:
        made = _attach(source, address, world.rank)
    return source if made is None else made


def _attach(source: ImageDataset, address: Sequence[int], rank: int) -> CachedDataset | None:
    try:
        buffer = SharedBuffer.attach(address)
    except OSError as error:  # another container or user
        say(f"data.cache ram: rank {rank} cannot share the memory ({error}): reads files")
        return None
    return CachedDataset(source, buffer, buffer.read(np.int64, (len(source), COLUMNS), 0))


def _decode_all(
    source: ImageDataset, num_workers: int, world: DistributedContext
) -> CachedDataset | None:
    """Decode a dataset into a buffer that starts with its entries; None if it does not fit.

    Every `ROUND_SECONDS` it signals to the other ranks, which wait, that it is still working.
    """
    start = time.monotonic()
    limit, too_large = memory_for(source, len(source))
    if too_large:
        say(f"data.cache ram: {too_large}: they are read from files")
        return None
    writer = _Writer(source, limit)
    entries: list[Tensor] = []
    last = start
    with batches_of(data_loader(writer, num_workers, batch_size=ROWS_AT_ONCE)) as loaded:
        for rows in loaded:
            heartbeat()
            entries.append(rows)
            if time.monotonic() - last >= ROUND_SECONDS:
                distributed.any_rank(True, world)
                last = time.monotonic()
    table = torch.cat(entries).numpy()
    writer.buffer.write(table, 0)
    stored = int((table[:, 0] != NOT_STORED).sum())
    rest = len(source) - stored
    say(
        f"data.cache ram: {stored} images decoded to {writer.end.value / 2**30:.3g} GiB of "
        f"shared memory in {time.monotonic() - start:.1f} s"
        + (f"; {rest} unreadable or not fitting are read from files" if rest else "")
    )
    return CachedDataset(source, writer.buffer, table)


def memory_for(source: ImageDataset, count: int) -> tuple[int, str]:
    """Return the bytes that a cache may take, and why `count` images do not fit, if they do not.

    Their size is that of some images of `source`, evenly spaced.
    """
    limit = int((available_host_memory() or 0) * MEMORY_FRACTION)
    indices = evenly_spaced(len(source), PROBED)
    sizes = [pixels.nbytes for index in indices if (pixels := _read(source, index)[1]) is not None]
    expected = count * sum(sizes) // max(1, len(sizes))
    return limit, "" if expected <= limit else (
        f"{count:,} decoded images need about {expected / 2**30:.3g} GiB, and "
        f"{limit / 2**30:.3g} GiB of memory are free for them"
    )


def _read(source: ImageDataset, index: int) -> tuple[Entry, np.ndarray | None]:
    """Return an image's entry, without an offset, and its pixels; None if it is unreadable."""
    try:
        image, label = source[index]
    except Exception:  # raised again and reported when the image is trained on
        return Entry(), None
    if isinstance(image, Image.Image):
        pixels = np.atleast_3d(np.asarray(image))
        return Entry(IMAGE, pixels.shape, label), pixels
    kind = ARRAY if image.dtype == torch.uint8 else FLOAT_ARRAY
    return Entry(kind, tuple(image.shape), label), image.numpy()


class _Writer(Dataset[Tensor]):
    """Write each image into a buffer of at most `limit` bytes, and return its entry, int64 [6]."""

    def __init__(self, source: ImageDataset, limit: int):
        self.source, self.limit = source, limit
        self.buffer = SharedBuffer.create()
        check_shared_memory()
        self.end = multiprocessing.Value("q", len(source) * COLUMNS * 8)
        """Bytes of the buffer in use."""

    collate = staticmethod(torch.stack)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        entry, pixels = _read(self.source, index)
        if pixels is not None:
            with self.end.get_lock():
                offset = self.end.value
                fits = offset + pixels.nbytes <= self.limit
                self.end.value += pixels.nbytes if fits else 0
            entry = entry._replace(offset=offset) if fits else Entry()
            if fits:
                try:
                    self.buffer.write(pixels, offset)
                except OSError:  # beyond the limit on the size of a file (ulimit -f), which counts
                    entry = Entry()
        return torch.tensor([entry.kind, *entry.shape, entry.label, entry.offset])
