"""A device crops and resizes images in memory as loader processes do, up to rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_decoding import ALONE, CPU, batches, compare, cpu_decoder, opened, write_images
from hostile import broken, unusual
from image_files import npy

from mae_et.config.data import DataConfig
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.config.schema import PretrainConfig
from mae_et.data import loader as loading
from mae_et.data.bad_images import BadImages
from mae_et.data.cache import cache_images
from mae_et.data.device import choose_decoder as choice
from mae_et.data.device import decode_ahead, encoded
from mae_et.data.device.box_resize import resize_boxes
from mae_et.data.device.choose_decoder import MEMORY, choose_decoder, decode_torchvision
from mae_et.data.device.decode_ahead import DeviceDecoder
from mae_et.data.device.decoder_trial import Trial, try_decoder
from mae_et.data.device.encoded import read_encoded
from mae_et.data.loader import training_batches
from mae_et.data.sampler import CurriculumBatchSampler, SampleIndex
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
    return DeviceDecoder(CPU, dataset.sides, None, library=MEMORY)


@pytest.fixture
def gpu(monkeypatch) -> DistributedContext:
    """Return a rank with a GPU, which is the CPU."""
    decode_ahead.notify.cache_clear()
    monkeypatch.setattr(choice, "fastest_resize", lambda _: (resize_boxes, ""))
    monkeypatch.setattr(choice, "DeviceDecoder", lambda _, *rest: DeviceDecoder(CPU, *rest))
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


def test_only_the_box_leaves_the_loader_processes(tmp_path: Path, monkeypatch) -> None:
    """An image of too many pixels is left to them."""
    dataset = in_memory(write_images(tmp_path))
    index = SampleIndex(2, 1, 0)
    view = read_encoded(dataset, index)
    assert view is not None
    whole = np.asarray(dataset.source[2][0])
    box, *_ = dataset.draw_view(index, *whole.shape[:2])
    top, left, height, width = map(int, box)
    assert view.box == (0, 0, height, width)
    assert np.array_equal(view.content, whole[top : top + height, left : left + width])
    monkeypatch.setattr(encoded, "MAX_DEVICE_PIXELS", whole.size // 3 - 1)
    assert read_encoded(dataset, index) is None


def test_boxes_are_pinned_by_the_threads_of_the_decoder(tmp_path: Path, monkeypatch) -> None:
    """DataLoader, which has one thread for that, pins all that is smaller."""
    pins: list[bool] = []

    class Loader(list[Any]):
        num_workers = 0

        def __init__(self, *_: Any, pin_memory: bool, **__: Any):
            pins.append(pin_memory)

    monkeypatch.setattr(loading, "data_loader", Loader)
    dataset = in_memory(write_images(tmp_path))
    sampler = CurriculumBatchSampler(dataset.plan, 0, dict.fromkeys((16, 24, 32), 4))
    for decoder in (from_memory(dataset), cpu_decoder(dataset), None):
        with training_batches(dataset, sampler, 2, torch.device("cuda"), decoder=decoder):
            pass
    assert pins == [False, True, True]


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
