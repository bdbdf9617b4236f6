"""Load batches in worker processes, and replay recently loaded images."""

import contextlib
import shutil
import signal
from collections.abc import Iterator
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from mae_et.data.bad_images import BadImages, WithSubstitutes
from mae_et.data.batch import AnyBatch, collate
from mae_et.data.device.decode_ahead import DeviceDecoder, decoded_ahead
from mae_et.data.device.encoded import EncodedDataset
from mae_et.data.device_copy import copied
from mae_et.data.sampler import CurriculumBatchSampler, SampleIndex, chunks, sample_seed
from mae_et.data.train_dataset import AugmentedDataset
from mae_et.errors import RunFailed
from mae_et.runtime.signals import STOP_SIGNALS
from mae_et.runtime.system_errors import NO_SHARED_MEMORY, WORKER_DIED

CPU = torch.device("cpu")
WORKER_GRACE_SECONDS = 120
LEAST_SHARED_MEMORY = 2**20
STALL_SECONDS = 0.01
"""How long to wait for the loader before handing out an already decoded batch."""


@contextlib.contextmanager
def training_batches(
    dataset: Any,
    sampler: CurriculumBatchSampler,
    num_workers: int = 0,
    device: torch.device = CPU,
    bad_images: BadImages | None = None,
    decoder: DeviceDecoder | None = None,
) -> Iterator[Iterator[Any]]:
    """Load the sampler's micro-batches, from its first step to the plan's last.

    Without loader processes, images load in this one. Batches for a GPU are pinned, and copied to
    it. Without `bad_images`, which counts images that cannot be read and are replaced by others,
    the first one raises `Unreadable`. Without a `decoder`, loader processes decode.
    """
    pin_memory = device.type == "cuda"
    views = dataset if bad_images is None else WithSubstitutes(dataset)
    loaded_from = views
    if decoder is not None:
        loaded_from = EncodedDataset(dataset, views, decoder.cpu_sides)
    with contextlib.ExitStack() as stack:
        loader = data_loader(
            loaded_from,
            num_workers,
            batch_sampler=sampler,
            pin_memory=pin_memory,
            timeout=STALL_SECONDS if decoder is not None and num_workers else 0,
        )
        batches = stack.enter_context(batches_of(loader))
        if decoder is not None:
            batches = stack.enter_context(decoded_ahead(batches, decoder, views))
        if sampler.replay:
            batches = replayed(batches, sampler, dataset, pin_memory and decoder is None)
        if decoder is None:
            batches = copied(batches, device)
        yield batches if bad_images is None else bad_images.track(batches)


def replayed(
    loaded: Iterator[AnyBatch],
    sampler: CurriculumBatchSampler,
    dataset: AugmentedDataset[AnyBatch],
    pin_memory: bool,
) -> Iterator[AnyBatch]:
    """Yield every micro-batch, completed with recently loaded images, which get new masks.

    Images that a device has decoded stay there.
    """
    held: dict[SampleIndex, AnyBatch] = {}
    for step in sampler.steps():
        size = sampler.micro_batch[step.stage.bandwidth]
        if not sampler.replays(step.stage):
            for _ in chunks(step.loaded, size):
                yield next(loaded)
            continue
        for part in chunks(step.loaded, size):
            batch = next(loaded)
            kind: Any = type(batch)
            for index, sample in zip(part, zip(*batch, strict=True), strict=True):
                # Without a copy, each sample would keep the whole batch in memory.
                held[index] = kind(*(tensor.clone() for tensor in sample))
        for number, part in enumerate(chunks(step.used, size)):
            reused = torch.arange(len(part)) + number * size >= step.new
            seed = sample_seed(dataset.seed, step.step, sampler.rank, number)
            batch = dataset.refresh(collate([held[i] for i in part]), reused, seed)
            yield kind(*(tensor.pin_memory() for tensor in batch)) if pin_memory else batch
        for index in step.dropped:
            del held[index]


def data_loader(dataset: Dataset[Any], num_workers: int, **options: Any) -> DataLoader[Any]:
    """Return a loader whose processes leave stop signals to this one.

    `options` are DataLoader's. With `batch_size`, batches are in order; the last may be smaller.
    """
    return DataLoader(
        dataset,
        collate_fn=getattr(dataset, "collate", collate),
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        **options,
    )


@contextlib.contextmanager
def batches_of(loader: DataLoader[AnyBatch]) -> Iterator[Iterator[Any]]:
    """Iterate over a loader, and end its processes when the block ends.

    If no batch arrives within the loader's `timeout`, yield None.

    After an error, a traceback keeps the iterator alive, and at exit Python would wait for loader
    processes that wait for work.
    """
    if loader.num_workers:
        check_shared_memory()
    batches = iter(loader)
    try:
        yield _whole(batches) if loader.num_workers else batches
    finally:
        end = getattr(batches, "_shutdown_workers", None)  # absent without workers
        if end is not None:
            end()


def check_shared_memory() -> None:
    """Raise RunFailed if /dev/shm is full, where loader processes would start with tracebacks.

    Semaphores take a page of it each.
    """
    with contextlib.suppress(OSError):  # other systems have no such folder
        space = shutil.disk_usage("/dev/shm")
        if space.free < LEAST_SHARED_MEMORY and space.total:  # a total of 0 is no limit
            raise RunFailed(NO_SHARED_MEMORY)


def _whole(batches: Iterator[AnyBatch]) -> Iterator[AnyBatch | None]:
    """Yield batches, and None after each timeout.

    A loader process that dies while passing on a batch raises `RunFailed`: the socket for its
    memory is closed or refuses to connect. So does the end of the thread that pins memory, which
    stops at such errors on a GPU: with a timeout, torch does not check the thread.
    """
    pinning = getattr(batches, "_pin_memory_thread", None)  # absent on a CPU
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            if "in DataLoader worker process" in str(error):  # reported by a live process
                raise
            raise RunFailed(WORKER_DIED) from error
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            if pinning is not None and not pinning.is_alive():
                raise RunFailed(WORKER_DIED) from error
            batch = None
        yield batch


def _start_worker(worker: int) -> None:
    """Ignore stop signals in a loader process, and report batches that cannot be passed on.

    The training process decides when to stop.

    Launchers signal the whole group, and a loader process that dies of it would end the run before
    it can save. After SIGTERM the process ends after a grace period, in case nobody else ends it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_SECONDS))
    Queue._on_queue_feeder_error = _pass_on_error  # type: ignore[attr-defined]


def _pass_on_error(queue: Any, error: Exception, batch: tuple[int, Any]) -> None:
    """Pass on an error at which a batch was lost (a full /dev/shm) in its place.

    Python's queues only print it, and the training process would wait for the batch.
    """
    wrapped = ExceptionWrapper(
        (type(error), error, error.__traceback__), "in DataLoader worker process"
    )
    queue.put((batch[0], wrapped))
