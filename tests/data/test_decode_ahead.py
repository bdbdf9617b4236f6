"""Batches that a device decodes are those of loader processes, up to the decoder's rounding.

The device is the CPU here: the same code, without streams.
"""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from device_decoding import (
    ALONE,
    CPU,
    LEVELS,
    METHODS,
    SIZES,
    batches,
    compare,
    cpu_decoder,
    damaged,
    decoding_threads,
    opened,
    write_images,
)
from hostile import broken, unreadable, unusual
from natural_images import natural
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import RandomResizedCrop

from mae_et import pretrain
from mae_et.config.commands import PrepareConfig
from mae_et.config.data import DataConfig
from mae_et.data.bad_images import BadImages
from mae_et.data.device import choose_decoder as choice
from mae_et.data.device import decode_ahead
from mae_et.data.device.choose_decoder import decode_torchvision
from mae_et.data.device.decode_ahead import DeviceDecoder
from mae_et.data.device.encoded import read_encoded
from mae_et.data.images import jpeg_crop
from mae_et.data.loader import training_batches
from mae_et.data.prepare import prepare
from mae_et.data.sampler import CurriculumBatchSampler, SampleIndex
from mae_et.errors import RunFailed, Unreadable
from mae_et.io.metrics_file import read_metrics
from mae_et.training.plan import micro_batch_size

session = importlib.import_module("mae_et.training.session")


@pytest.fixture(autouse=True)
def _decode_whole_images(monkeypatch) -> None:
    """Let crop.method decode read the whole image, as the device does, not a coarser scale."""
    monkeypatch.setattr(jpeg_crop, "coarsest_scale", lambda *_: 1)


@pytest.mark.parametrize("method", METHODS)
def test_batches_are_those_of_loader_processes(tmp_path: Path, method: str) -> None:
    """Boxes, flips and order: natural images in another box would differ by far more."""
    dataset = opened(DataConfig(root=write_images(tmp_path)), method)
    compare(batches(dataset, cpu_decoder(dataset)), batches(dataset, None))


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.1), (1.0, 1.0)])
def test_boxes_are_bit_for_bit_those_of_torchvision(tmp_path: Path, monkeypatch, scale) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path), scale=scale))
    drawn, get_params = [], RandomResizedCrop.get_params

    def watched(*arguments: Any) -> Any:
        drawn.append(get_params(*arguments))
        return drawn[-1]

    for number in range(len(dataset)):
        draw = SampleIndex(number, 3, 2)
        with monkeypatch.context() as patch:
            patch.setattr(RandomResizedCrop, "get_params", staticmethod(watched))
            view = dataset[draw]
        ours = read_encoded(dataset, draw)
        assert ours is not None
        assert ours.box == drawn.pop()
        assert torch.equal(ours.noise, view.noise)


@pytest.mark.parametrize("kind", ["wds", "shards"])
@pytest.mark.parametrize("method", METHODS)
def test_shards_are_read_as_folders_are(tmp_path: Path, kind: str, method: str) -> None:
    root = write_images(tmp_path / "files")
    options: Any = {"splits": ("train",), "levels": (24, 32)}
    prepare(PrepareConfig(tmp_path / "shards", DataConfig(root=root), **options))
    folder = tmp_path / "shards"
    if kind == "wds":  # the originals of prepared shards are tar shards
        (tmp_path / "wds" / "train").mkdir(parents=True)
        for path in folder.glob("train/*-original.tar"):
            path.rename(tmp_path / "wds" / "train" / path.name)
        folder = tmp_path / "wds"
    dataset = opened(DataConfig(kind, folder), method)
    compare(batches(dataset, cpu_decoder(dataset)), batches(dataset, None))


def test_images_do_not_depend_on_how_many_are_decoded_at_once(tmp_path: Path, monkeypatch) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    whole = batches(dataset, cpu_decoder(dataset))
    monkeypatch.setattr(decode_ahead, "MAX_DECODED_BYTES", 3 * 50 * 50)
    sizes: list[list[int]] = []

    def decode(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        images = decode_torchvision(contents, device)
        sizes.append([image.nbytes for image in images])
        return images

    compare(batches(dataset, cpu_decoder(dataset, decode)), whole, 0)
    together = [each for each in sizes if len(each) > 1]
    assert together
    assert all(sum(each) <= decode_ahead.MAX_DECODED_BYTES for each in together)


def test_replayed_images_are_flipped_and_masked_as_without_a_device(tmp_path: Path) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    size = micro_batch_size(3, dataset.plan, 1)
    replay: Any = {"replay": {16: 2}, "replay_images": 6}
    sampler = CurriculumBatchSampler(dataset.plan, 0, size, **replay)
    found = []
    for decoder in (cpu_decoder(dataset), None):
        with training_batches(dataset, sampler, decoder=decoder) as loaded:
            found.append(list(loaded))
    compare(*found)
    used = sum(len(batch.images) for batch in found[0])
    assert sum(map(len, sampler)) < used


def mixed(root: Path) -> Path:
    """Write usual JPEGs among every odd file, and what nobody can read."""
    folder = write_images(root, 5) / "train"
    for name, content in (unusual() | broken()).items():
        (folder / name).write_bytes(content)
    for name, make in unreadable().items():
        if name != "endless.png":
            make(folder / name)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_odd_files_are_made_by_the_loader_in_their_place(tmp_path: Path, method: str) -> None:
    """Any file but a usual JPEG has the dataset's pixels, or those of its substitute."""
    dataset = opened(DataConfig(root=mixed(tmp_path)), method)
    results = []
    for decoder in (cpu_decoder(dataset), None):
        bad = BadImages(dataset, 1.0, tmp_path, ALONE, 0)
        results.append((batches(dataset, decoder, bad_images=bad), sorted(bad.waiting)))
    (ours, replaced), (todays, replaced_today) = results
    compare(ours, todays, 255)
    assert replaced == replaced_today
    assert len({sample for sample, _, _ in replaced}) == len(broken()) + len(unreadable()) - 1
    sampler = CurriculumBatchSampler(dataset.plan, 0, micro_batch_size(3, dataset.plan, 1))
    odd = 0
    for draws, one, other in zip(sampler, ours, todays, strict=True):
        for place, draw in enumerate(draws):
            try:
                usual = read_encoded(dataset, draw) is not None
            except Exception:
                usual = False
            close = (one.images[place].int() - other.images[place].int()).abs().float()
            assert close.max() <= (LEVELS if usual else 0)
            odd += not usual
    assert odd > len(unusual())


def refusing(refused: Any) -> Any:
    """Return a decoder without partial results, that raises for some files."""

    def decode(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        if any(refused(content) for content in contents):
            raise RuntimeError("nvjpegDecodeBatched failed: 5")
        return decode_torchvision(contents, device)

    return decode


def test_a_jpeg_that_the_device_refuses_is_decoded_by_the_cpu(tmp_path: Path, capsys) -> None:
    decode_ahead.notify.cache_clear()
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    todays, ours = batches(dataset, None), batches(dataset, cpu_decoder(dataset))
    unchanged = partial(decode_jpeg, mode=ImageReadMode.UNCHANGED)  # one channel of grey files
    grey = cpu_decoder(dataset, lambda files, device: unchanged(files, device=device))
    compare(batches(dataset, grey), ours, 0)
    assert capsys.readouterr().err == ""
    some = batches(dataset, cpu_decoder(dataset, refusing(lambda file: len(file) % 2)))
    none = batches(dataset, cpu_decoder(dataset, refusing(lambda file: True)))
    taken_over = 0
    for today, all_decoded, some_decoded, undecoded in zip(todays, ours, some, none, strict=True):
        assert torch.equal(undecoded.images, today.images)
        for number, image in enumerate(some_decoded.images):
            from_cpu = torch.equal(image, today.images[number])
            assert from_cpu or torch.equal(image, all_decoded.images[number])
            taken_over += from_cpu
    assert 0 < taken_over < sum(len(batch.images) for batch in todays)
    assert capsys.readouterr().err.count("the decoder of the device refused JPEGs") == 1


def test_an_image_that_comes_out_in_another_size_is_decoded_by_the_cpu(tmp_path: Path) -> None:
    def rotating(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        return [image.mT for image in decode_torchvision(contents, device)]

    dataset = opened(DataConfig(root=write_images(tmp_path)))
    for one, today in zip(
        batches(dataset, cpu_decoder(dataset, rotating)), batches(dataset, None), strict=True
    ):
        square = 32  # of the sizes, one alone is the same after a quarter turn
        differing = (one.images != today.images).flatten(1).any(1).sum()
        assert differing <= sum(s == (square, square) for s in SIZES) * 2


def test_a_broken_image_is_replaced_as_without_a_device(tmp_path: Path) -> None:
    dataset = opened(DataConfig(root=damaged(tmp_path)))
    assert read_encoded(dataset, SampleIndex(3, 0, 0)) is not None
    found = []
    for decoder in (cpu_decoder(dataset), None):
        bad = BadImages(dataset, 1.0, tmp_path, ALONE, 0)
        found.append((batches(dataset, decoder, bad_images=bad), bad.waiting))
    (ours, replaced), (todays, replaced_today) = found
    compare(ours, todays)
    assert replaced == replaced_today
    assert {sample for sample, _, _ in replaced} == {3}
    for one, today in zip(ours, todays, strict=True):
        place = one.replaced[:, 0] >= 0
        assert torch.equal(one.images[place], today.images[place])


def test_a_broken_image_stops_a_run_that_replaces_none(tmp_path: Path) -> None:
    dataset = opened(DataConfig(root=damaged(tmp_path)))
    with pytest.raises(Unreadable, match=r"cannot read the image .*03\.jpg"):
        batches(dataset, cpu_decoder(dataset))


@pytest.fixture
def torchcodec() -> Any:
    """Return the library, which takes the same arguments for a CPU as for a GPU."""
    try:
        import torchcodec
    except Exception as error:  # not installed, or made for another torch
        pytest.skip(f"TorchCodec does not load: {error}")
    return torchcodec


def test_torchcodec_makes_the_views_of_the_cpu_path(tmp_path: Path, torchcodec) -> None:
    """It rotates by EXIF, which is hidden from it: grey and rotated JPEGs, of each sampling."""
    root = write_images(tmp_path)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 3  # by half a turn, which keeps the size
    natural(40, 48, 99).save(root / "train" / "turned.jpg", exif=turned, quality=95)
    dataset = opened(DataConfig(root=root))
    assert choice._find_decoder(CPU) == (choice._decode_torchcodec, "TorchCodec")
    assert choice._find_decoder(CPU, "torchvision") == (decode_torchvision, "torchvision")
    ours = batches(dataset, cpu_decoder(dataset, choice._decode_torchcodec))
    compare(ours, batches(dataset, None))


def test_torchcodec_has_a_decoder_for_cuda(torchcodec) -> None:
    arguments = torch.ops.torchcodec_ns.decode_jpegs_cuda.default._schema.arguments
    assert [str(each.type) for each in arguments] == ["List[Tensor]", "int", "Device"]


def test_a_stopped_run_resumes_bit_for_bit_on_the_device_path(tiny, tmp_path, monkeypatch) -> None:
    root = write_images(tmp_path / "images", 3)
    inherited = []

    def chosen(_, dataset, __, ___, *before) -> DeviceDecoder:
        inherited.append(before)
        return DeviceDecoder(CPU, dataset.sides, decode_torchvision, cpu_sides=(24,))

    monkeypatch.setattr(session, "choose_decoder", chosen)
    flags = [f"--data.root={root}", "--output.tensorboard=false", "--efficiency.micro_batch=3"]
    flags.append("--crop.method=decode")
    whole = pretrain(tiny(*flags, f"--output.dir={tmp_path / 'whole'}"))
    config = tiny(*flags)
    for stop in (3, 7):
        pretrain(config, stop_after_step=stop)
    resumed = pretrain(config)
    assert (resumed / "encoder.safetensors").read_bytes() == (
        whole / "encoder.safetensors"
    ).read_bytes()
    assert read_metrics(resumed)[-1]["loss"] == read_metrics(whole)[-1]["loss"]
    assert not decoding_threads()
    assert inherited == [(None, ())] * 2 + [("torchvision", (24,))] * 2


def test_arrays_that_are_not_8_bits_are_refused(tmp_path: Path) -> None:
    import numpy as np

    (tmp_path / "train").mkdir()
    for number in range(4):
        np.save(tmp_path / "train" / f"{number}.npy", np.ones((9, 9, 3), np.float32))
    dataset = opened(DataConfig(root=tmp_path))
    with pytest.raises(RunFailed, match=r"efficiency\.decode gpu needs 8-bit images"):
        batches(dataset, cpu_decoder(dataset))
