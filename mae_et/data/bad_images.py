"""Replace images that cannot be read, record them, and stop if there are too many.

The replacement is a function of (seed, epoch, sample), so batches keep their size, other samples
their positions, and a resumed run sees the same images. Each batch carries the indices of its
replaced images: they are counted when it is trained on, not when it is prefetched.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from mae_et.data.batch import AnyBatch
from mae_et.data.sampler import SampleIndex, sample_seed
from mae_et.errors import RunFailed, Unreadable, listed
from mae_et.io.atomic import write_text_atomically
from mae_et.io.metrics_file import Row, read_metrics
from mae_et.runtime import distributed
from mae_et.runtime.broadcast import broadcast_outline
from mae_et.runtime.console import say
from mae_et.runtime.distributed import DistributedContext

ATTEMPTS = 20
TOLERATED = 10
TOLERATED_FRACTION = 0.1
RECORD = "unreadable.jsonl"
_SUBSTITUTE = -3  # separates these seeds from those of permutations and replay


class WithSubstitutes(Dataset[Any]):
    """Wrap an `AugmentedDataset` to replace each image that cannot be read by another.

    The replacement gets the crop and mask of the image that it replaces.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, index: SampleIndex) -> Any:
        try:
            return self.dataset[index]
        except Unreadable as error:
            first = error
        for attempt in range(ATTEMPTS):
            key = (index.epoch, index.sample, attempt, _SUBSTITUTE)
            other = sample_seed(self.dataset.seed, *key) % len(self.dataset)
            try:
                substitute = self.dataset.augment(index, other)
            except Unreadable:
                continue
            return substitute._replace(replaced=torch.tensor(index))
        raise RunFailed(f"{first}; neither can {ATTEMPTS} random substitutes be read")


def refuse_excess(
    bad: int, images: int, max_fraction: float, of: str = "", which: str = ""
) -> None:
    """Raise RunFailed if more than a fraction of a dataset's images are unreadable.

    A small fraction of a small dataset may be less than one image, so up to `TOLERATED` images, but
    at most a tenth of the dataset, are tolerated unless `max_fraction` is 0. The message names the
    dataset as `of` and the images as `which`.
    """
    share = int(max_fraction * images)
    least = min(TOLERATED, int(images * TOLERATED_FRACTION)) if max_fraction else 0
    most = max(least, share)
    if bad <= most:
        return
    small = f" ({most}: a tenth of a small dataset, at most {TOLERATED})"
    raise RunFailed(
        f"{bad} of {images} images{of} cannot be read, more than data.max_bad_fraction "
        f"{max_fraction:g} allows{small if most > share else ''}{which}; "
        f"to accept them, set data.max_bad_fraction {math.ceil(1000 * bad / images) / 1000:g}"
    )


class BadImages:
    """The images of a run that could not be read so far, the same on every rank.

    Every rank must build this. The main rank reads the record in the run folder, without the rows
    after step `start`, which the run resumes from.
    """

    def __init__(
        self, dataset: Any, max_fraction: float, folder: Path, world: DistributedContext, start: int
    ):
        self.dataset, self.world = dataset, world
        self.max_fraction, self.record = max_fraction, folder / RECORD
        found: list[Row] = []
        if world.is_main:
            found = read_metrics(
                folder, RECORD, lambda row: row.get("sample") in range(len(dataset))
            )
        found = broadcast_outline(found, world)
        self.rows = [row for row in found if row["step"] <= start]
        self.known = {row["sample"] for row in self.rows}
        self.waiting: list[list[int]] = []
        """Sample indices replaced on this rank since the last row."""

    def track(self, batches: Iterator[AnyBatch]) -> Iterator[AnyBatch]:
        """Yield micro-batches, and note the replaced images in them."""
        for batch in batches:
            self.waiting += batch.replaced[batch.replaced[:, 0] >= 0].tolist()
            yield batch

    def exchange(self, step: int) -> None:
        """Exchange the images that a rank could not read; the main rank records and reports them.

        Too many end the run (`refuse_excess`).
        """
        mine = torch.tensor(self.waiting, dtype=torch.int64).reshape(-1, 3)
        self.waiting = []
        before = len(self.rows)
        rows = distributed.all_gather_rows(mine, self.world).tolist()
        for index in map(SampleIndex._make, rows):
            if index.sample in self.known:
                continue
            self.known.add(index.sample)
            reason = self._reason(index) if self.world.is_main else ""
            self.rows.append({"step": step, "sample": index.sample, "reason": reason})
        if self.world.is_main and len(self.rows) > before:
            self.write()
        name = self.dataset.source.name
        first = [name(row["sample"]) for row in self.rows[:4]]  # one more than is shown
        which = f": {listed(first, 3)}"
        refuse_excess(len(self.known), len(self.dataset), self.max_fraction, which=which)

    def write(self) -> None:
        """Write the record, without rows after the checkpoint that the run resumed from."""
        if self.rows or self.record.exists():
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            write_text_atomically(self.record, text)

    def _reason(self, index: SampleIndex) -> str:
        try:
            self.dataset.augment(index, index.sample)
        except Unreadable as error:
            reason = str(error)
        else:
            name = self.dataset.source.name(index.sample)
            reason = f"the image {name} could not be read, and now can be"
        say(f"{reason}; another image replaces it")
        return reason
