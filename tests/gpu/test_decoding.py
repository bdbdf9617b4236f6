"""JPEGs decoded by the GPU: the views of the CPU's path, and no harm to memory in use."""

import io
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from natural_images import jpeg, natural
from PIL import Image

from mae_et.config.data import DataConfig
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.schedule import Curriculum, Stage
from mae_et.data.batch import Batch
from mae_et.data.cached_dataset import CachedDataset
from mae_et.data.datasets import open_dataset
from mae_et.data.device.box_resize import resize_boxes
from mae_et.data.device.choose_decoder import _find_decoder, choose_decoder, decode_torchvision
from mae_et.data.device.decode_ahead import DeviceDecoder
from mae_et.data.device.decoder_trial import LEAST_DECIBELS, MEDIAN_DECIBELS
from mae_et.data.device.encoded import FilePlace
from mae_et.data.device.self_checks import checked_decode, fastest_resize
from mae_et.data.images import jpeg_crop
from mae_et.data.images.jpeg_header import read_header
from mae_et.data.loader import training_batches
from mae_et.data.sampler import CurriculumBatchSampler
from mae_et.data.train_dataset import TrainDataset
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.plan import micro_batch_size

pytestmark = pytest.mark.usefixtures("decode")
STAGES = (Stage(16, 1), Stage(32, 1))
SIZES = ((96, 128), (131, 90), (100, 100), (61, 33))
TRIES = 50


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder of JPEGs, some grey or progressive."""
    folder = tmp_path_factory.mktemp("jpegs")
    (folder / "train").mkdir()
    for number in range(24):
        image = natural(*SIZES[number % len(SIZES)], number)
        image = image.convert("L") if number % 7 == 6 else image
        content = jpeg(image, progressive=number % 5 == 4)
        (folder / "train" / f"{number:02}.jpg").write_bytes(content)
    return folder


def opened(root: Path, method: str) -> tuple[TrainDataset, Plan]:
    source = open_dataset(DataConfig(root=root), "train")
    plan = Curriculum(STAGES, 32, 8).plan(2, len(source), 8)
    return TrainDataset(source, DataConfig(root=root), plan, 8, 0, method), plan  # type: ignore[arg-type]


def decoder_of(dataset: TrainDataset, device: torch.device) -> DeviceDecoder:
    if device.type == "cuda":
        decoder = choose_decoder("gpu", dataset, DistributedContext(0, 1, device))
        assert decoder is not None
        return decoder
    return DeviceDecoder(device, dataset.sides, decode_torchvision)


def batches(dataset: TrainDataset, plan: Plan, decoder: DeviceDecoder | None) -> list[Batch]:
    sampler = CurriculumBatchSampler(plan, 0, micro_batch_size(4, plan, 1))
    with training_batches(dataset, sampler, decoder=decoder) as loaded:
        return [Batch(*(tensor.cpu().clone() for tensor in batch)) for batch in loaded]


@pytest.mark.parametrize("method", ["fourier", "resize", "decode"])
def test_views_are_those_of_the_cpu_path(
    root: Path, device: torch.device, method: str, monkeypatch
) -> None:
    """Order, masks and stages bit for bit; pixels within the rounding of decoders."""
    monkeypatch.setattr(jpeg_crop, "coarsest_scale", lambda *_: 1)  # as the device decodes
    dataset, plan = opened(root, method)
    ours = batches(dataset, plan, decoder_of(dataset, device))
    theirs = batches(dataset, plan, None)
    assert len(ours) == len(theirs) > 0
    errors = []
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.stage, other.stage)
        errors.append((one.images.float() - other.images.float()).square().mean(dim=(1, 2, 3)))
    decibels = 10 * torch.log10(255**2 / torch.cat(errors).clamp(min=1e-3))
    assert decibels.median() > MEDIAN_DECIBELS
    assert decibels.min() > LEAST_DECIBELS


def test_kernels_resize_as_products_do(device: torch.device) -> None:
    """Bit for bit, at the sides of the recipes."""
    if device.type != "cuda":
        pytest.skip("a CPU has no kernels")
    resize, reason = fastest_resize(device)
    assert reason == ""
    draw = np.random.default_rng(0)
    images, boxes = [], []
    for shape in [*draw.integers(1, 400, (60, 2)), (1, 3000), (3000, 1), (1200, 900)]:
        height, width = map(int, shape)
        pixels = torch.from_numpy(draw.integers(0, 256, (3, height, width), np.uint8)).to(device)
        images.append(pixels if len(images) % 7 else pixels[:1].expand(3, -1, -1))
        h, w = int(draw.integers(1, height + 1)), int(draw.integers(1, width + 1))
        boxes.append((int(draw.integers(height - h + 1)), int(draw.integers(width - w + 1)), h, w))
    flips = [number % 2 == 0 for number in range(len(images))]
    for size in (17, 96, 160, 224):
        assert torch.equal(
            resize(images, boxes, flips, size), resize_boxes(images, boxes, flips, size)
        )


def test_batches_have_the_pixels_of_images_decoded_alone(
    device: torch.device, root: Path, decode
) -> None:
    """Also where a library's own batches have others: then runs decode an image at a time."""
    found, _ = _find_decoder(device)
    assert found is not None
    checked, note = checked_decode(found, device)
    files = sorted((root / "train").iterdir())
    contents = [torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files]
    usable = [each for each in contents if read_header(bytes(each)) is not None]
    alone = [found([each], device)[0] for each in usable]
    assert len(alone) > 12
    for together in (checked(usable, device) for _ in range(3)):
        assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True)), note


def corrupted(
    decode: Callable[[], object], shapes: list[tuple[int, ...]], device: torch.device
) -> int:
    """Return in how many tries a decoder overwrites memory that queued kernels still read.

    Tensors of the size of the images are read by kernels that wait behind a long one; they are
    freed, so that the allocator may hand out their memory, and images are decoded at once.
    """
    wrong = 0
    for _ in range(TRIES if device.type == "cuda" else 1):
        held = [torch.full(shape, 7, dtype=torch.uint8, device=device) for shape in shapes]
        if device.type == "cuda":
            torch.cuda._sleep(20_000_000)  # about 10 ms
        read = [tensor.clone() for tensor in held]
        del held
        decode()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wrong += any(bool((tensor != 7).any()) for tensor in read)
    return wrong


def test_decoding_leaves_memory_in_use_alone(device: torch.device, root: Path) -> None:
    """NvJPEG's hardware engine ignores the stream it is given (pytorch/vision#9606).

    Decoded on the stream of the training and without waiting, images overwrite memory in use; on a
    stream of their own that is drained before, they must not.
    """
    shapes = [(3, 512, 683)] * 8
    files = [_noise(512, 683, seed) for seed in range(len(shapes))]
    contents = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in files]
    places = [
        FilePlace(n, len(each), 512, 683, (0, 0, 512, 683), False) for n, each in enumerate(files)
    ]
    content = torch.cat(contents)
    decoder = decoder_of(opened(root, "fourier")[0], device)
    decoding = decoder.decode
    assert not isinstance(decoding, CachedDataset)
    own_stream = decoder.streams[0]
    scope = nullcontext() if own_stream is None else torch.cuda.stream(own_stream)

    def decode() -> None:
        """Decode on the decoder's stream, as `DeviceDecoder.__call__` does."""
        with scope:
            images = decoder._images(decoding, content, places, own_stream)
        assert [tuple(image.shape) for image in images if image is not None] == shapes

    decode_at_once = partial(decoding, contents, device)
    unguarded = corrupted(decode_at_once, shapes, device)
    decode()  # fills the pool of memory of its stream
    guarded = corrupted(decode, shapes, device)
    assert guarded == 0, f"wrong tries of {TRIES}; without the guard {unguarded}"
    if not unguarded:
        pytest.skip("without the guard nothing is overwritten: this decoder waits by itself")


def _noise(height: int, width: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()
