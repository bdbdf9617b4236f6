"""A device crops and resizes images in memory as loader processes do, up to rounding."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from device_decoding import ALONE, CPU, batches, compare, opened, write_images
from hostile import broken, unusual
from image_files import npy

from mae_et.config.data import DataConfig
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.config.schema import PretrainConfig
from mae_et.data.bad_images import BadImages
from mae_et.data.cache import cache_images
from mae_et.data.cached_dataset import CachedDataset
from mae_et.data.device import choose_decoder as choice
from mae_et.data.device import decode_ahead, encoded
from mae_et.data.device.box_resize import resize_boxes
from mae_et.data.device.choose_decoder import MEMORY, choose_decoder, decode_torchvision
from mae_et.data.device.decode_ahead import DeviceDecoder
from mae_et.data.device.decoder_trial import Trial, try_decoder
from mae_et.data.device.encoded import read_encoded
from mae_et.data.sampler import SampleIndex
from mae_et.data.shared_buffer import SharedBuffer
from mae_et.data.train_dataset import TrainDataset
from mae_et.runtime.distributed import DistributedContext


def in_memory(root: Path, method: Any = "fourier") -> TrainDataset:
    """Return training images of a folder, kept in memory."""
    data = DataConfig(root=root, cache="ram")
    dataset = opened(data, method)
    config = PretrainConfig(data=data, efficiency=EfficiencyConfig(num_workers=0))
    dataset.source = cache_images(dataset.source, config, ALONE)
    return dataset


def from_memory(dataset: TrainDataset) -> DeviceDecoder:
    assert isinstance(dataset.source, CachedDataset)
    return DeviceDecoder(CPU, dataset.sides, dataset.source, library=MEMORY)


@pytest.fixture
def gpu(monkeypatch) -> DistributedContext:
    """Return a rank with a GPU, which is the CPU."""
    decode_ahead.notify.cache_clear()
    monkeypatch.setattr(choice, "fastest_resize", lambda _: (resize_boxes, ""))
    monkeypatch.setattr(choice, "DeviceDecoder", lambda _, *rest: DeviceDecoder(CPU, *rest))
    monkeypatch.setattr(SharedBuffer, "pin", lambda *_: "")
    return DistributedContext(0, 1, torch.device("cuda"))


@pytest.mark.parametrize("method", ["fourier", "resize"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_loader_processes(tmp_path: Path, method, num_workers: int) -> None:
    """Whatever is in memory; images that cannot be read are replaced by the same ones."""
    folder = write_images(tmp_path) / "train"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for name, content in (unusual() | broken() | {"array.npy": npy(pixels)}).items():
        (folder / name).write_bytes(content)
    dataset = in_memory(tmp_path, method)
    results = []
    for decoder in (from_memory(dataset), None):
        bad = BadImages(dataset, 1.0, tmp_path, ALONE, 0)
        made = batches(dataset, decoder, bad_images=bad, num_workers=num_workers)
        results.append((made, sorted(bad.waiting)))
    (ours, replaced), (todays, replaced_today) = results
    compare(ours, todays, 48)  # noise of 30 pixels, which Pillow clamps between two passes
    assert replaced == replaced_today
    assert len({sample for sample, _, _ in replaced}) == len(broken())


def test_no_pixels_leave_the_loader_processes(tmp_path: Path, monkeypatch) -> None:
    """An image of too many pixels is left to them."""
    dataset = in_memory(write_images(tmp_path))
    index = SampleIndex(2, 1, 0)
    view = read_encoded(dataset, index)
    assert view is not None
    box, *_ = dataset.draw_view(index, view.header.height, view.header.width)
    assert (view.box, view.content.nbytes) == (tuple(map(int, box)), 0)
    whole = np.asarray(dataset.source[2][0])
    assert whole.shape == (view.header.height, view.header.width, 3)
    monkeypatch.setattr(encoded, "MAX_DEVICE_PIXELS", whole.size // 3 - 1)
    assert read_encoded(dataset, index) is None


def test_rows_of_images_are_read_in_place(tmp_path: Path) -> None:
    """Those of arrays [C H W] are rearranged."""
    folder = write_images(tmp_path) / "train"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    (folder / "array.npy").write_bytes(npy(pixels))
    source: Any = in_memory(tmp_path).source
    rows = source.rows(*np.array([[0, 3, 5], [len(source) - 1, 7, 9]]).T)
    assert np.array_equal(rows[0], np.asarray(source[0][0])[3:8].flatten())
    assert rows[0].untyped_storage().data_ptr() == source.buffer.whole().data_ptr()
    assert np.array_equal(rows[1], pixels[7:16].flatten())


class Runtime:
    """CUDA's runtime, which pins memory, or has an error."""

    def __init__(self, error: int):
        self.error, self.pinned = error, dict[int, int]()
        self.cudaError = SimpleNamespace(success=0)

    def cudaHostRegister(self, start: int, length: int, flags: int) -> int:  # noqa: N802
        assert flags == 1  # portable
        assert self.error or start not in self.pinned  # CUDA refuses it
        self.pinned[start] = length
        return self.error

    def cudaHostUnregister(self, start: int) -> int:  # noqa: N802
        del self.pinned[start]
        return 0

    def cudaGetErrorString(self, error: int) -> str:  # noqa: N802
        return f"error {error}"


@pytest.mark.parametrize("error", [0, 2])
def test_memory_is_pinned_while_it_exists(tmp_path: Path, monkeypatch, error: int) -> None:
    runtime = Runtime(error)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    dataset: Any = in_memory(write_images(tmp_path))
    buffer = dataset.source.buffer
    whole = buffer.whole()
    for _ in range(2):
        assert buffer.pin(CPU) == ("error 2" if error else "")
    assert runtime.pinned == {whole.data_ptr(): len(whole)}
    del buffer, dataset
    assert runtime.pinned == ({whole.data_ptr(): len(whole)} if error else {})


def float_array(number: int) -> bytes:
    return npy(np.full((9, 9 + number, 3), 0.5, np.float32))


def test_auto_takes_the_device_if_faster_and_a_resumed_run_keeps_it(
    tmp_path: Path, gpu, monkeypatch, capsys
) -> None:
    dataset = in_memory(write_images(tmp_path))
    assert try_decoder(from_memory(dataset), dataset, 1, 2).fault == ""
    monkeypatch.setattr(choice, "try_decoder", lambda *_: Trial(9000.0, 4000.0))
    decoder = choose_decoder("auto", dataset, gpu, 16)
    assert decoder is not None
    assert decoder.library == MEMORY
    said = "images are cropped by the GPU (efficiency.decode auto): memory 9,000 images/s at 32 px"
    assert said in capsys.readouterr().err
    compare(batches(dataset, decoder), batches(dataset, None))
    for before, taken in (("cpu", False), (MEMORY, True), ("TorchCodec", True)):
        assert (choose_decoder("auto", dataset, gpu, 16, before) is not None) is taken
        assert ("pixels differ" in capsys.readouterr().err) is (before == "TorchCodec")
    monkeypatch.setattr(choice, "_find_decoder", lambda *_: (decode_torchvision, "torchvision"))
    monkeypatch.setattr(choice, "checked_decode", lambda decode, _: (decode, ""))
    choose_decoder("auto", opened(dataset.config), gpu, 16, MEMORY)
    assert "before by the GPU from memory: pixels differ" in capsys.readouterr().err


def test_arrays_of_more_bits_are_left_to_the_cpu(tmp_path: Path, gpu, capsys) -> None:
    (tmp_path / "train").mkdir()
    for number in range(4):
        (tmp_path / "train" / f"{number}.npy").write_bytes(float_array(number))
    assert choose_decoder("auto", in_memory(tmp_path), gpu) is None
    assert "the images in memory do not have 3 channels of 8 bits" in capsys.readouterr().err
