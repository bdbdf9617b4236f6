"""Batches that a device decodes are those of loader processes, up to the decoder's rounding.

The device is the CPU here: the same code, without streams.
"""

import importlib
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hostile import broken, unreadable, unusual
from natural_images import jpeg, natural
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from finetune.config import RecipeConfig
from finetune.transforms import LabelledTrainDataset
from mae_et import pretrain
from mae_et.config.commands import PrepareConfig
from mae_et.config.data import DataConfig
from mae_et.curriculum.schedule import Curriculum, Stage
from mae_et.data import choose_decoder as choice
from mae_et.data import decoder_trial, device_checks, device_decode, encoded, jpeg_crop
from mae_et.data.bad_images import BadImages
from mae_et.data.batch import Batch
from mae_et.data.box_resize import resize_boxes
from mae_et.data.choose_decoder import choose_decoder, decode_torchvision
from mae_et.data.datasets import open_dataset
from mae_et.data.decoder_trial import Trial, try_decoder
from mae_et.data.device_decode import DeviceDecoder
from mae_et.data.encoded import EncodedDataset, PackedBatch, read_encoded
from mae_et.data.loader import training_batches
from mae_et.data.prepare import prepare
from mae_et.data.sampler import CurriculumBatchSampler, SampleIndex
from mae_et.data.train_dataset import TrainDataset
from mae_et.errors import RunFailed, Unreadable, UserError
from mae_et.io.metrics_file import read_metrics
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.plan import micro_batch_size
from mae_et.training.same_data import provenance_of

session = importlib.import_module("mae_et.training.session")
CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, CPU)
STAGES = (Stage(16, 1, 0), Stage(24, 1, 0), Stage(32, 1, 0))
METHODS = ("fourier", "resize", "decode")
SIZES = ((40, 48), (61, 33), (100, 37), (32, 32), (17, 90), (9, 12), (75, 100), (33, 34))
LEVELS = 16
"""Levels by which a view may differ from Pillow's, which clamps and rounds twice."""


@pytest.fixture(autouse=True)
def _decode_whole_images(monkeypatch) -> None:
    """Let crop.method decode read the whole image, as the device does, not a coarser scale."""
    monkeypatch.setattr(jpeg_crop, "coarsest_scale", lambda *_: 1)


def write_images(root: Path, copies: int = 2) -> Path:
    """Write JPEGs of many sizes, some grey, of each sampling, to a folder's train split."""
    (root / "train").mkdir(parents=True, exist_ok=True)
    for number, (height, width) in enumerate(SIZES * copies):
        image = natural(height, width, number)
        grey = number % 5 == 4
        content = jpeg(image.convert("L")) if grey else jpeg(image, subsampling=number % 3)
        (root / "train" / f"{number:02}.jpg").write_bytes(content)
    return root


def opened(config: DataConfig, method: Any = "fourier", stages: Any = STAGES) -> TrainDataset:
    source = open_dataset(config, "train")
    plan = Curriculum(stages, 32, 8).plan(2, len(source), 4)
    dataset = TrainDataset(source, config, plan, 8, 0, method)
    dataset.plan = plan  # type: ignore[attr-defined]
    return dataset


def cpu_decoder(dataset: TrainDataset, decode: Any = decode_torchvision) -> DeviceDecoder:
    return DeviceDecoder(CPU, dataset.sides, decode)


def batches(dataset: Any, decoder: DeviceDecoder | None, **options: Any) -> list[Batch]:
    """Return all micro-batches of a plan, of three images each."""
    sampler = CurriculumBatchSampler(dataset.plan, 0, micro_batch_size(3, dataset.plan, 1))
    with training_batches(dataset, sampler, decoder=decoder, **options) as loaded:
        return [Batch(*(tensor.clone() for tensor in batch)) for batch in loaded]


def compare(ours: list[Batch], todays: list[Batch], levels: int = LEVELS) -> None:
    """Assert that everything but pixels is the same bit for bit, and that pixels are close."""
    assert len(ours) == len(todays) > 0
    for one, other in zip(ours, todays, strict=True):
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.stage, other.stage)
        assert torch.equal(one.replaced.expand_as(other.replaced), other.replaced)
        assert one.images.dtype == other.images.dtype == torch.uint8
        difference = (one.images.int() - other.images.int()).abs().float()
        assert difference.max() <= levels
        assert difference.mean() < 1


# --- the same views -------------------------------------------------------------------------------


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


def test_flips_have_the_configured_chance(tmp_path: Path) -> None:
    root = write_images(tmp_path)
    for method in METHODS:
        for chance in (0.0, 1.0, 0.5):
            dataset = opened(DataConfig(root=root, flip=chance), method)
            draws = [SampleIndex(n % len(dataset), n, 0) for n in range(64)]
            share = sum(read_encoded(dataset, draw).flip for draw in draws) / 64  # type: ignore[union-attr]
            assert abs(share - chance) <= 0.2 * (chance == 0.5)


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


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    alone = batches(dataset, cpu_decoder(dataset))
    for one, other in zip(
        alone, batches(dataset, cpu_decoder(dataset), num_workers=2), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_images_do_not_depend_on_how_many_are_decoded_at_once(tmp_path: Path, monkeypatch) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    whole = batches(dataset, cpu_decoder(dataset))
    monkeypatch.setattr(device_decode, "MAX_DECODED_BYTES", 3 * 50 * 50)
    for one, other in zip(whole, batches(dataset, cpu_decoder(dataset)), strict=True):
        assert torch.equal(one.images, other.images)


# --- images that the device does not read ---------------------------------------------------------


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
    device_decode.notify.cache_clear()
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    todays, ours = batches(dataset, None), batches(dataset, cpu_decoder(dataset))
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


def damaged(root: Path) -> Path:
    """Write images; one has a usual header but damaged tables, which no decoder reads."""
    write_images(root)
    path = root / "train" / "03.jpg"
    content = path.read_bytes()
    tables = content.index(b"\xff\xc4")
    path.write_bytes(content[: tables + 5] + b"\xff" * 16 + content[tables + 21 :])
    return root


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


# --- the threads ----------------------------------------------------------------------------------


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_two_micro_batches_are_decoded_at_once_and_come_in_order(
    tmp_path: Path,
) -> None:
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
    for one, other in zip(
        batches(dataset, decoder), batches(dataset, cpu_decoder(dataset)), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert waited == [True]
    assert free[1] == 0
    assert len(decoder.streams) == device_decode.THREADS


def test_the_threads_end_when_training_raises_and_when_it_stops_early(tmp_path: Path) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    sampler = CurriculumBatchSampler(dataset.plan, 0, micro_batch_size(3, dataset.plan, 1))
    loading = training_batches(dataset, sampler, decoder=cpu_decoder(dataset))

    def train() -> None:
        with loading as loaded:
            next(loaded)
            assert 1 <= len(decoding_threads()) <= device_decode.THREADS
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


# --- streams, which are mocks here ----------------------------------------------------------------


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
    """The order that keeps nvJPEG from memory in use: see `device_decode`."""
    calls: list[str] = []

    @contextmanager
    def entered(stream: Any) -> Iterator[None]:
        calls.append("enter")
        yield
        calls.append("leave")

    def decode(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        calls.append("decode")
        return decode_torchvision(contents, device)

    monkeypatch.setattr(device_decode, "MAX_DECODED_BYTES", 1)  # an image at a time
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: MockStream(calls))
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: calls.append("in use"))
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    decoder = cpu_decoder(dataset, decode)
    decoder.streams = [MockStream(calls)]  # type: ignore[list-item]
    device_decode._taken_over(decoder(packed(dataset)), dataset)
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


# --- TorchCodec -----------------------------------------------------------------------------------


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


def test_at_most_two_micro_batches_are_ahead_of_the_training(tmp_path: Path) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    started: list[int] = []

    def counted(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        started.append(len(contents))
        return decode_torchvision(contents, device)

    sampler = CurriculumBatchSampler(dataset.plan, 0, micro_batch_size(3, dataset.plan, 1))
    with training_batches(dataset, sampler, decoder=cpu_decoder(dataset, counted)) as loaded:
        for taken, _ in enumerate(loaded, start=1):
            assert len(started) <= taken + device_decode.AHEAD
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
    for one, other in zip(found, usual, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- runs -----------------------------------------------------------------------------------------


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


def test_a_checkpoint_that_does_not_say_where_it_decoded_did_so_on_the_cpu(tmp_path: Path) -> None:
    source = opened(DataConfig(root=write_images(tmp_path))).source
    for origin in (None, {}, {"data": "x"}):
        assert provenance_of(source, ALONE, {"origin": origin})["decode"] == "cpu"
    assert provenance_of(source, ALONE)["decode"] is None


# --- where to decode ------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch) -> DistributedContext:
    """Return a rank with a GPU, which is the CPU: its decoder is torchvision's."""
    device_decode.notify.cache_clear()
    monkeypatch.setattr(choice, "_find_decoder", lambda *_: (decode_torchvision, "TorchCodec"))
    monkeypatch.setattr(choice, "checked_decode", lambda decode, _: (decode, ""))
    monkeypatch.setattr(choice, "fastest_resize", lambda _: (resize_boxes, ""))
    monkeypatch.setattr(choice, "DeviceDecoder", lambda _, *rest: DeviceDecoder(CPU, *rest))
    return DistributedContext(0, 1, torch.device("cuda"))


def test_auto_and_cpu_decode_in_loader_processes_on_a_cpu(tmp_path: Path, gpu, capsys) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    assert choose_decoder("auto", dataset, ALONE) is None
    assert choose_decoder("cpu", dataset, gpu) is None
    assert not capsys.readouterr().err


def test_gpu_without_cuda_is_refused_before_anything_is_written(
    tiny, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny(f"--data.root={write_images(tmp_path / 'images')}", "--efficiency.decode=gpu")
    with pytest.raises(UserError, match=r"efficiency\.decode gpu .*: torch sees no CUDA"):
        pretrain(config)
    assert not config.output.dir.exists()


@pytest.mark.parametrize(
    ("data", "channels", "reason"),
    [
        ({"augment": "rand-mstd0.5-inc1"}, 3, "RandAugment (data.augment) runs on the CPU"),
        ({"replay": {16: 2}}, 3, "data.replay keeps images on the CPU"),
        ({}, 1, "model.channels is 1, not 3"),
    ],
)
def test_what_the_gpu_path_lacks_is_said_and_left_to_the_cpu(
    tmp_path: Path, gpu, capsys, data, channels: int, reason: str
) -> None:
    config = DataConfig(root=write_images(tmp_path), **data)
    source = open_dataset(config, "train", channels)
    plan = Curriculum(STAGES, 32, 8).plan(2, len(source), 4)
    dataset = TrainDataset(source, config, plan, 8, 0)
    assert choose_decoder("auto", dataset, gpu) is None
    assert reason in capsys.readouterr().err
    with pytest.raises(UserError) as raised:
        choose_decoder("gpu", dataset, gpu)
    assert reason in str(raised.value)


def test_classifiers_decode_on_the_cpu(tmp_path: Path, gpu, capsys) -> None:
    config = DataConfig(root=write_images(tmp_path))
    source = open_dataset(config, "train")
    plan = Curriculum(STAGES, 32, 8).plan(2, len(source), 4)
    dataset = LabelledTrainDataset(source, config, RecipeConfig(), plan, 0)
    assert choose_decoder("auto", dataset, gpu) is None
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="only pre-training"):
        choose_decoder("gpu", dataset, gpu)


FASTER, SLOWER = Trial(9000.0, 4000.0), Trial(3000.0, 4000.0)
WRONG = Trial(9000.0, 4000.0, "the GPU's views differ")


@pytest.mark.parametrize(
    ("requested", "before", "trial", "place", "said"),
    [
        ("auto", None, FASTER, "gpu", "GPU (efficiency.decode auto): TorchCodec 9,000 images/s"),
        ("auto", None, SLOWER, "cpu", "(efficiency.decode auto): the GPU with TorchCodec 3,000"),
        ("auto", None, WRONG, "cpu", "CPU (efficiency.decode auto): the GPU's views differ"),
        ("auto", "gpu", SLOWER, "gpu", "GPU (efficiency.decode auto)"),
        ("auto", "TorchCodec", SLOWER, "gpu", "GPU (efficiency.decode auto)"),
        ("auto", "torchvision", SLOWER, "gpu", "so far by torchvision: pixels differ by rounding"),
        ("auto", "gpu", WRONG, "cpu", "views differ; so far by the GPU: pixels differ by rounding"),
        ("auto", "cpu", FASTER, "cpu", "CPU (efficiency.decode auto): as before; gpu changes it"),
        ("gpu", "cpu", WRONG, "gpu", "TorchCodec; so far by the CPU: pixels differ by rounding"),
        ("cpu", "gpu", FASTER, "cpu", "CPU (efficiency.decode cpu): so far by the GPU: pixels"),
    ],
)  # fmt: skip
def test_the_faster_decoder_is_taken_if_right_and_a_resumed_run_keeps_it(
    tmp_path: Path, gpu, monkeypatch, capsys, requested: Any, before, trial, place: str, said: str
) -> None:
    """An explicit choice is obeyed; every change is said."""
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    monkeypatch.setattr(choice, "try_decoder", lambda *_: trial)
    decoder = choose_decoder(requested, dataset, gpu, 16, before)
    assert (decoder is not None) is (place == "gpu")
    err = capsys.readouterr().err
    assert said in err
    assert ("pixels differ" in err) is (before not in (None, place, "TorchCodec"))


def test_images_of_each_size_are_decoded_where_that_is_faster(
    tmp_path: Path, gpu, monkeypatch, capsys
) -> None:
    """At 16 px the CPU reads a small scale; a resumed run keeps that, whatever is faster now."""
    dataset = opened(DataConfig(root=write_images(tmp_path)), "decode")
    trials = [SLOWER, FASTER, FASTER]  # by stage
    monkeypatch.setattr(choice, "try_decoder", lambda *given: trials[given[-1]])
    decoder = choose_decoder("auto", dataset, gpu, 16)
    assert decoder is not None
    assert decoder.cpu_sides == (16,)
    said = "decoded by the GPU, at 16 px by the CPU (efficiency.decode auto): TorchCodec 3,000 "
    assert f"{said}images/s at 16 px, 16 loader processes 4,000; 9,000" in capsys.readouterr().err
    ours, by_gpu = batches(dataset, decoder), batches(dataset, cpu_decoder(dataset))
    for one, gpus, todays in zip(ours, by_gpu, batches(dataset, None), strict=True):
        expected = todays if one.images.shape[-1] == 16 else gpus
        assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))
    trials.reverse()
    resumed = choose_decoder("auto", dataset, gpu, 16, "TorchCodec", (16,))
    assert resumed is not None
    assert resumed.cpu_sides == (16,)
    assert "so far" not in capsys.readouterr().err
    asked = choose_decoder("gpu", dataset, gpu, 16, "TorchCodec", (16,))
    assert asked is not None
    assert asked.cpu_sides == ()
    assert "so far by TorchCodec, at 16 px by the CPU: pixels" in capsys.readouterr().err


def test_the_gpu_is_taken_on_all_ranks_or_on_none(tmp_path: Path, gpu, monkeypatch, capsys) -> None:
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    monkeypatch.setattr(choice, "try_decoder", lambda *_: FASTER)
    monkeypatch.setattr(choice, "any_rank", lambda flag, _: not flag)  # another rank is slower
    assert choose_decoder("auto", dataset, gpu, 16) is None
    assert "CPU (efficiency.decode auto): on another rank, the GPU" in capsys.readouterr().err


def swapped(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    return [image.flip(0) for image in decode_torchvision(contents, device)]


def shifted(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    return [image.roll(1, -1) for image in decode_torchvision(contents, device)]


def failing(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    raise torch.OutOfMemoryError("CUDA out of memory\nTry ...")


@pytest.mark.parametrize(
    ("decode", "fault"),
    [
        (decode_torchvision, ""),
        (swapped, "the GPU's views differ from the CPU's (PSNR "),
        (shifted, "the GPU's views differ from the CPU's (PSNR "),
        (failing, "the GPU's decoder failed (OutOfMemoryError: CUDA out of memory)"),
    ],
)
def test_a_decoder_with_other_pixels_or_errors_is_found_unfit(
    tmp_path: Path, decode, fault: str
) -> None:
    """A broken image among those that are tried counts against nobody."""
    dataset = opened(DataConfig(root=damaged(tmp_path)))
    found = try_decoder(cpu_decoder(dataset, decode), dataset, 2, 2).fault
    assert found.startswith(fault)
    assert bool(found) is bool(fault)


def test_files_other_than_jpegs_are_left_to_the_cpu(tmp_path: Path) -> None:
    write_images(tmp_path)
    for path in (tmp_path / "train").glob("*.jpg"):
        natural(20, 30).save(path.with_suffix(".png"))
        path.unlink()
    dataset = opened(DataConfig(root=tmp_path))
    fault = try_decoder(cpu_decoder(dataset), dataset, 2, 2).fault
    assert fault == "the images are not mostly baseline JPEGs"


@pytest.mark.parametrize(("third", "rate"), [("jpg", 256), ("png", 5 * 10 / 1.2)])
def test_rates_count_loader_processes_and_what_they_decode_in_a_short_trial(
    tmp_path: Path, monkeypatch, third: str, rate: float
) -> None:
    """The CPU makes a view in 0.3 s, so four are tried; the device takes a second for 256."""
    for path in sorted((write_images(tmp_path) / "train").iterdir())[::3]:
        Image.open(path).convert("RGB").save(path.with_suffix(f".{third}"))
        if third == "png":
            path.unlink()
    dataset, now, lock = opened(DataConfig(root=tmp_path)), [0.0], threading.Lock()
    augment = TrainDataset.augment

    def slow(*arguments: Any) -> Batch:
        now[0] += 0.3
        return augment(*arguments)

    def decode(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        with lock:
            now[0] += 1.0
        return decode_torchvision(contents, device)

    monkeypatch.setattr(TrainDataset, "augment", slow)
    monkeypatch.setattr(decoder_trial.time, "perf_counter", lambda: now[0])
    trial = try_decoder(cpu_decoder(dataset, decode), dataset, 5, 2)
    assert trial.fault == ""
    assert trial.cpu == pytest.approx(5 / 0.3)
    assert trial.device == pytest.approx(rate)
    assert now[0] < 8


def leaking(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    """Let an image of a batch overwrite a line of the one before, as TorchCodec 0.17 may."""
    images = decode_torchvision(contents, device)
    for before, after in pairwise(images[8:]):
        before[:, -1] = after[:, -1]
    return images


def batches_failing(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    if len(contents) > 1:
        raise RuntimeError("no batches")
    return decode_torchvision(contents, device)


@pytest.mark.parametrize(
    ("decode", "note"),
    [
        (leaking, "; an image at a time, for its batches have wrong pixels"),
        (batches_failing, "; an image at a time, for a batch failed: no batches"),
        (decode_torchvision, ""),
    ],
)
def test_a_decoder_whose_batches_are_wrong_decodes_an_image_at_a_time_and_the_line_says_so(
    tmp_path: Path, gpu, monkeypatch, capsys, decode, note: str
) -> None:
    monkeypatch.setattr(device_checks, "HEIGHT", 16)
    monkeypatch.setattr(choice, "_find_decoder", lambda *_: (decode, "TorchCodec"))
    checked = device_checks.checked_decode
    monkeypatch.setattr(choice, "checked_decode", lambda decode, _: checked(decode, CPU))
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    decoder = choose_decoder("gpu", dataset, gpu)
    assert decoder is not None
    assert (decoder.decode is not decode) is bool(note)
    assert f"(efficiency.decode gpu): TorchCodec{note}\n" in capsys.readouterr().err
    compare(batches(dataset, decoder), batches(dataset, None))


@pytest.mark.parametrize("kernels", [None, SimpleNamespace(resize_boxes=lambda *_: torch.zeros(1))])
def test_products_resize_where_kernels_fail_or_are_wrong_and_the_line_says_so(
    tmp_path: Path, gpu, monkeypatch, capsys, kernels: Any
) -> None:
    monkeypatch.setitem(sys.modules, "mae_et.data.box_resize_triton", kernels)
    monkeypatch.setattr(choice, "fastest_resize", lambda _: device_checks.fastest_resize(CPU))
    decoder = choose_decoder("gpu", opened(DataConfig(root=write_images(tmp_path))), gpu)
    assert decoder is not None
    assert decoder.resize is resize_boxes
    said = "; resized without Triton, which is slower: "
    said += "its pixels are wrong" if kernels else "import of mae_et.data.box_resize_triton halted"
    assert said in capsys.readouterr().err
    right = SimpleNamespace(resize_boxes=lambda *views: resize_boxes(*views))
    monkeypatch.setitem(sys.modules, "mae_et.data.box_resize_triton", right)
    assert device_checks.fastest_resize(CPU) == (right.resize_boxes, "")


def test_a_library_that_decodes_no_jpeg_on_the_device_is_not_taken_and_says_why(
    monkeypatch,
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("nvJPEG is not\nsupported")

    assert choice._find_decoder(CPU)[0] is not None
    monkeypatch.setattr(choice, "_decode_torchcodec", fails)
    name = "torchvision (TorchCodec: nvJPEG is not supported)"
    assert choice._find_decoder(CPU) == (decode_torchvision, name)
    monkeypatch.setattr(choice, "decode_torchvision", lambda *_: [torch.zeros(3, 8, 8)] * 2)
    decode, reason = choice._find_decoder(CPU)
    assert decode is None
    assert "TorchCodec: nvJPEG is not supported; torchvision: images of [(3, 8, 8)" in reason


def test_arrays_that_are_not_8_bits_are_refused(tmp_path: Path) -> None:
    import numpy as np

    (tmp_path / "train").mkdir()
    for number in range(4):
        np.save(tmp_path / "train" / f"{number}.npy", np.ones((9, 9, 3), np.float32))
    dataset = opened(DataConfig(root=tmp_path))
    with pytest.raises(RunFailed, match=r"efficiency\.decode gpu needs 8-bit images"):
        batches(dataset, cpu_decoder(dataset))
