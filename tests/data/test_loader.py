import shutil
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import pytest
import torch

from mae_et import Curriculum, Stage
from mae_et.config.data import DataConfig
from mae_et.data.batch import Batch
from mae_et.data.device_copy import copied
from mae_et.data.loader import batches_of, data_loader, replayed
from mae_et.data.sampler import CurriculumBatchSampler
from mae_et.data.sources.synthetic import Synthetic
from mae_et.data.train_dataset import TrainDataset
from mae_et.errors import RunFailed
from mae_et.training.plan import micro_batch_size

PLAN = Curriculum((Stage(16, 1, 2), Stage(32, 1, 9)), 32, 8).plan(3, 50, 12)


def view(augment: str | None = None) -> TrainDataset:
    return TrainDataset(Synthetic(50, 32), DataConfig(augment=augment), PLAN, 8, 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    batches = CurriculumBatchSampler(PLAN, 0, micro_batch_size(4, PLAN, 1))
    alone = list(data_loader(view("rand-mstd0.5-inc1"), 0, batch_sampler=batches))
    spread = list(data_loader(view("rand-mstd0.5-inc1"), workers, batch_sampler=batches))
    assert len(alone) == len(list(batches))
    for one, other in zip(alone, spread, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.noise, other.noise)


def replay(start: int = 0, micro: int = 4, rank: int = 0, world: int = 1) -> list[Batch]:
    batches = CurriculumBatchSampler(
        PLAN, 0, micro_batch_size(micro, PLAN, world), rank, world, start, {16: 3}, 10
    )
    loader = data_loader(view(), 0, batch_sampler=batches)
    return list(replayed(iter(loader), batches, view(), False))


def images(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


def test_replay_fills_each_batch_with_recently_loaded_images() -> None:
    first = PLAN.stages[0]
    batches = replay(micro=12)
    assert len(batches) == PLAN.steps
    assert {len(batch.images) for batch in batches} == {12}
    loaded: list[torch.Tensor] = []
    flips = 0
    for batch in batches[: first.steps]:
        loaded += batch.images[:4]  # a third is new
        for image in batch.images[4:]:
            as_it_was = any(torch.equal(image, other) for other in loaded[-10:])
            flipped = any(torch.equal(image.flip(-1), other) for other in loaded[-10:])
            assert as_it_was or flipped
            flips += flipped
    assert 0 < flips < 8 * first.steps
    assert len(loaded) == 4 * first.steps


def test_every_use_of_an_image_has_a_mask_of_its_own() -> None:
    """Over micro-batches, steps and ranks."""
    batches = [batch for rank in range(2) for batch in replay(micro=1, rank=rank, world=2)]
    masks = [tuple(noise.tolist()) for batch in batches for noise in batch.noise]
    assert len(set(masks)) == len(masks) == PLAN.images


def test_a_batch_is_copied_on_a_stream_that_training_waits_for(monkeypatch) -> None:
    """Beside queued kernels, and its memory is kept for those that read it (see tests/gpu)."""
    gpu, device = MagicMock(), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: gpu.copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: gpu.training)
    monkeypatch.setattr(torch.cuda, "stream", gpu.on)
    stage = torch.zeros(1)
    batch = next(copied(iter([Batch(gpu.images, gpu.noise, stage, stage)]), device))
    assert batch == (gpu.images.to(), gpu.noise.to(), stage, stage)
    assert gpu.mock_calls[:8] == [
        call.on(gpu.copies),
        call.on().__enter__(),
        call.images.to(device, non_blocking=True),
        call.noise.to(device, non_blocking=True),
        call.on().__exit__(None, None, None),
        call.training.wait_stream(gpu.copies),
        call.images.to().record_stream(gpu.training),
        call.noise.to().record_stream(gpu.training),
    ]


class Dying:
    """A loader whose only process dies, or reports an error, after a batch."""

    num_workers = 1

    def __init__(self, error: Exception):
        self.error = error

    def __iter__(self) -> Iterator[int]:
        yield 1
        raise self.error


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError()])
def test_a_loader_process_that_dies_while_it_passes_a_batch_is_named(error: Exception) -> None:
    """Its memory is passed through a socket, which then ends or refuses to connect."""
    dying: Any = Dying(error)
    with batches_of(dying) as batches:
        assert next(batches) == 1
        with pytest.raises(RunFailed, match="a loader worker died"):
            next(batches)
    alive: Any = Dying(ConnectionError("Caught X in DataLoader worker process 0.\nof the data"))
    with batches_of(alive) as batches, pytest.raises(ConnectionError, match="of the data"):
        list(batches)


class Unsendable(torch.utils.data.Dataset):
    """Images that no process can pass on, as where /dev/shm is full."""

    collate = staticmethod(lambda _: threading.Lock())

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return index


def test_a_batch_that_cannot_be_passed_on_is_an_error_and_not_waited_for() -> None:
    loader = data_loader(Unsendable(), 1, batch_size=1, timeout=20)
    with batches_of(loader) as batches, pytest.raises(TypeError, match="cannot pickle"):
        next(batches)


def test_no_processes_start_if_shared_memory_is_full(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2**26, free=4096))
    loader: Any = Dying(EOFError())
    with pytest.raises(RunFailed, match=r"\(/dev/shm\) is full"), batches_of(loader):
        pass


class Stalled:
    """A loader that no batch reaches within its timeout, and its iterator."""

    num_workers = 1

    def __init__(self, pinning: threading.Thread):
        self._pin_memory_thread = pinning

    def __iter__(self) -> "Stalled":
        return self

    def __next__(self) -> None:
        raise RuntimeError("DataLoader timed out after 0.01 seconds")


def test_a_stalled_loader_whose_pinning_thread_has_died_is_not_waited_for() -> None:
    loader: Any = Stalled(threading.current_thread())
    with batches_of(loader) as batches:
        assert next(batches) is next(batches) is None
        loader._pin_memory_thread = threading.Thread()
    with batches_of(loader) as batches, pytest.raises(RunFailed, match="a loader worker died"):
        next(batches)
