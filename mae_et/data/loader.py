"""From datasets to batches on the host: loader processes, and images that are replayed."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mae_et.data.bad_images import BadImages, WithSubstitutes
from mae_et.data.sampler import CurriculumBatchSampler, SampleIndex, in_parts, sample_seed
from mae_et.runtime.signals import STOP_SIGNALS

WORKER_GRACE_SECONDS = 120
AnyBatch = TypeVar("AnyBatch", bound=tuple[Tensor, ...])


class AugmentedDataset(Protocol[AnyBatch]):
    """Random views of a source."""

    seed: int

    def __len__(self) -> int: ...

    def __getitem__(self, draw: SampleIndex, /) -> AnyBatch: ...

    def shown(self, draw: SampleIndex, sample: int) -> AnyBatch:
        """Return a view of an image as a draw says, which may be of another one."""

    def renewed(self, batch: AnyBatch, again: Tensor, seed: int) -> AnyBatch:
        """Return a batch in which images that are used again, marked [B], are seen anew."""


@contextlib.contextmanager
def training_batches(
    dataset: Any,
    sampler: CurriculumBatchSampler,
    num_workers: int = 0,
    pin_memory: bool = False,
    bad_images: BadImages | None = None,
) -> Iterator[Iterator[Any]]:
    """Load the sampler's micro-batches, from its first step to the plan's last.

    Args:
        dataset: augmented images, indexed by `SampleIndex`.
        sampler: which images, and at which stage.
        num_workers: loader processes; 0 loads in this process.
        pin_memory: copy batches to pinned memory, for asynchronous copies to a GPU.
        bad_images: counts images that cannot be read and are replaced by others; without it the
            first one raises `Unreadable`.
    """
    loaded_from = dataset if bad_images is None else WithSubstitutes(dataset)
    with batches_of(train_loader(loaded_from, sampler, num_workers, pin_memory)) as batches:
        if sampler.replay:
            batches = replayed(batches, sampler, dataset, pin_memory)
        yield batches if bad_images is None else bad_images.counted(batches)


def replayed(
    loaded: Iterator[AnyBatch],
    batches: CurriculumBatchSampler,
    view: AugmentedDataset[AnyBatch],
    pin_memory: bool,
) -> Iterator[AnyBatch]:
    """Yield the micro-batches of every step, with the images in them that are used again.

    Args:
        loaded: what a loader makes of `batches`.
        batches: the order.
        view: renews what is used again.
        pin_memory: whether what is put together is pinned, for a copy to a GPU.
    """
    held: dict[SampleIndex, tuple[Tensor, ...]] = {}
    for step in batches.steps():
        size = batches.micro_batch(step.stage.bandwidth)
        if not batches.replays(step.stage):
            for _ in in_parts(step.loaded, size):
                yield next(loaded)
            continue
        for part in in_parts(step.loaded, size):
            batch = next(loaded)
            kind: Any = type(batch)
            for draw, sample in zip(part, zip(*batch, strict=True), strict=True):
                # Without a copy each sample would keep the whole batch in memory.
                held[draw] = tuple(tensor.clone() for tensor in sample)
        for number, part in enumerate(in_parts(step.used, size)):
            stacked = (torch.stack(same) for same in zip(*(held[d] for d in part), strict=True))
            again = torch.arange(len(part)) + number * size >= step.new
            seed = sample_seed(view.seed, step.step, batches.rank, number)
            renewed = view.renewed(kind(*stacked), again, seed)
            yield kind(*(tensor.pin_memory() for tensor in renewed)) if pin_memory else renewed
        for draw in step.dropped:
            del held[draw]


def worker_count(requested: int | None, world: int = 1) -> int:
    """Return the loader processes of one rank: as requested, or its share of the cores."""
    if requested is not None:
        return requested
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(16, max(1, cores // here))


def train_loader(
    view: Dataset[AnyBatch], batches: CurriculumBatchSampler, workers: int, pin_memory: bool
) -> DataLoader[AnyBatch]:
    """Return a loader of the plan's micro-batches, from its first step to its last."""
    return DataLoader(
        view,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals,
    )


def eval_loader(
    view: Dataset[tuple[Tensor, int]], batch_size: int, workers: int
) -> DataLoader[Any]:
    """Return a loader of images [B C H W] and labels [B], in order; the last batch may be short."""
    return DataLoader(
        view, batch_size=batch_size, num_workers=workers, worker_init_fn=_leave_signals
    )


@contextlib.contextmanager
def batches_of(loader: DataLoader[AnyBatch]) -> Iterator[Iterator[AnyBatch]]:
    """Iterate over a loader, and end its processes when the block ends.

    After an error, a traceback keeps the iterator alive, and Python would wait at exit for loader
    processes that wait for work.
    """
    batches = iter(loader)
    try:
        yield batches
    finally:
        end = getattr(batches, "_shutdown_workers", None)  # absent without workers
        if end is not None:
            end()


def _leave_signals(worker: int) -> None:
    """Ignore stop signals in a loader process; the training process decides.

    Launchers signal the whole group, and a loader that died of it would end the run before it could
    save. After SIGTERM the loader ends by itself, in case nobody else ends it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_SECONDS))
