"""Batches are decoded ahead of the training, in order, by threads that end with it.

The device is the CPU here: streams are mocks.
"""

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from device_decoding import batches, compare, cpu_decoder, decoding_threads, opened, write_images
from torch import Tensor

from mae_et.config.data import DataConfig
from mae_et.data.device import decode_ahead, encoded
from mae_et.data.device.choose_decoder import decode_torchvision
from mae_et.data.device.encoded import EncodedDataset, PackedBatch, read_encoded
from mae_et.data.loader import training_batches
from mae_et.data.sampler import CurriculumBatchSampler, SampleIndex
from mae_et.data.train_dataset import TrainDataset
from mae_et.training.plan import micro_batch_size


def test_two_micro_batches_are_decoded_at_once_and_come_in_order(tmp_path: Path) -> None:
    """The first waits for the second to be decoded, and still comes first."""
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    second, free, waited = threading.Event(), [], []

    def decode(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        free.append(len(decoder.streams))
        if len(free) == 1:
            waited.append(second.wait(20))
        second.set()
        return decode_torchvision(contents, device)

    decoder = cpu_decoder(dataset, decode)
    compare(batches(dataset, decoder), batches(dataset, cpu_decoder(dataset)), 0)
    assert waited == [True]
    assert free[1] == 0
    assert len(decoder.streams) == decode_ahead.THREADS


def test_at_most_two_micro_batches_are_ahead_of_the_training(tmp_path: Path) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    started: list[int] = []

    def counted(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        started.append(len(contents))
        return decode_torchvision(contents, device)

    sampler = CurriculumBatchSampler(dataset.plan, 0, micro_batch_size(3, dataset.plan, 1))
    with training_batches(dataset, sampler, decoder=cpu_decoder(dataset, counted)) as loaded:
        for taken, _ in enumerate(loaded, start=1):
            assert len(started) <= taken + decode_ahead.AHEAD
    assert len(started) == len(list(sampler))


def test_decoded_batches_are_handed_out_in_order_while_the_loader_stalls(
    tmp_path: Path, monkeypatch
) -> None:
    """The loader reads the third micro-batch only after the training has had two."""
    dataset, trained = opened(DataConfig(root=write_images(tmp_path))), multiprocessing.Event()
    usual = batches(dataset, cpu_decoder(dataset))
    sampler = CurriculumBatchSampler(dataset.plan, 0, micro_batch_size(3, dataset.plan, 1))
    third, gave_up = next(islice(sampler, 2, None))[0], multiprocessing.Event()

    def stalled(dataset: TrainDataset, index: SampleIndex) -> Any:
        if index == third and not trained.wait(10):
            gave_up.set()
        return read_encoded(dataset, index)

    monkeypatch.setattr(encoded, "read_encoded", stalled)
    with training_batches(dataset, sampler, 1, decoder=cpu_decoder(dataset)) as loaded:
        found = [next(loaded), next(loaded)]
        trained.set()
        found += loaded
    assert not gave_up.is_set()
    compare(found, usual, 0)
    with decode_ahead.decoded_ahead(iter([None]), cpu_decoder(dataset), dataset) as early:
        assert list(early) == []  # a stall before the first micro-batch


def test_the_threads_end_when_training_raises_and_when_it_stops_early(tmp_path: Path) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    sampler = CurriculumBatchSampler(dataset.plan, 0, micro_batch_size(3, dataset.plan, 1))
    loading = training_batches(dataset, sampler, decoder=cpu_decoder(dataset))

    def train() -> None:
        with loading as loaded:
            next(loaded)
            assert 1 <= len(decoding_threads()) <= decode_ahead.THREADS
            raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        train()
    assert not decoding_threads()
    with training_batches(dataset, sampler, decoder=cpu_decoder(dataset)) as loaded:
        next(loaded)
    assert not decoding_threads()


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of"


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_exhausted_memory_of_the_thread_is_raised_in_the_training(tmp_path: Path, kind) -> None:
    """TorchCodec allocates through torch's stable ABI, which raises RuntimeError."""

    def out_of_memory(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        raise kind(OUT_OF_MEMORY)

    dataset = opened(DataConfig(root=write_images(tmp_path)))
    with pytest.raises(kind, match=OUT_OF_MEMORY):
        batches(dataset, cpu_decoder(dataset, out_of_memory))
    assert not decoding_threads()


class MockStream:
    """Records what is called."""

    def __init__(self, calls: list[str], fault: str = ""):
        self.calls, self.fault = calls, fault

    def synchronize(self) -> None:
        self.calls.append("drain")
        if self.fault:
            raise RuntimeError(self.fault)

    def record_event(self) -> str:
        self.calls.append("record")
        return "event"

    def wait_event(self, event: str) -> None:
        self.calls.append(f"wait for {event}")


def packed(dataset: TrainDataset) -> PackedBatch:
    draws = (SampleIndex(number, 0, 2) for number in range(4))
    return EncodedDataset.collate([read_encoded(dataset, draw) for draw in draws])


def test_the_stream_is_drained_before_each_call_and_memory_marked_as_in_use(
    tmp_path: Path, monkeypatch
) -> None:
    """The order that keeps nvJPEG from memory in use: see `decode_ahead`."""
    calls: list[str] = []

    @contextmanager
    def entered(stream: Any) -> Iterator[None]:
        calls.append("enter")
        yield
        calls.append("leave")

    def decode(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        calls.append("decode")
        return decode_torchvision(contents, device)

    monkeypatch.setattr(decode_ahead, "MAX_DECODED_BYTES", 1)  # an image at a time
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: MockStream(calls))
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: calls.append("in use"))
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    decoder = cpu_decoder(dataset, decode)
    stream, files = MockStream(calls), packed(dataset)
    decoder.streams = [stream]  # type: ignore[list-item]
    decode_ahead._taken_over(decoder(files), dataset)
    assert decoder.files_of == {stream: files.content}  # until it is drained again
    handed_over = ["record", "leave", "wait for event", "in use", "in use"]
    assert calls == ["enter", *["drain", "decode"] * 4, *handed_over]


def test_an_error_of_earlier_work_is_not_taken_for_a_refused_file(tmp_path: Path) -> None:
    calls: list[str] = []
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    decoder = cpu_decoder(dataset)
    stream = MockStream(calls, "CUDA error: an illegal memory access")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        decoder._batch(packed(dataset), stream)
    assert calls == ["drain"]
