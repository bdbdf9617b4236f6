"""JPEGs of many kinds, and their batches, decoded by a device that is the CPU here."""

import threading
from pathlib import Path
from typing import Any

import torch
from natural_images import jpeg, natural

from mae_et.config.data import DataConfig
from mae_et.curriculum.schedule import Curriculum, Stage
from mae_et.data.batch import Batch
from mae_et.data.datasets import open_dataset
from mae_et.data.device.choose_decoder import decode_torchvision
from mae_et.data.device.decode_ahead import DeviceDecoder
from mae_et.data.loader import training_batches
from mae_et.data.sampler import CurriculumBatchSampler
from mae_et.data.train_dataset import TrainDataset
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.plan import micro_batch_size

CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, CPU)
STAGES = (Stage(16, 1, 0), Stage(24, 1, 0), Stage(32, 1, 0))
METHODS = ("fourier", "resize", "decode")
SIZES = ((40, 48), (61, 33), (100, 37), (32, 32), (17, 90), (9, 12), (75, 100), (33, 34))
LEVELS = 16
"""Levels by which a view may differ from Pillow's, which clamps and rounds twice."""


def write_images(root: Path, copies: int = 2) -> Path:
    """Write JPEGs of many sizes, some grey, of each sampling, to a folder's train split."""
    (root / "train").mkdir(parents=True, exist_ok=True)
    for number, (height, width) in enumerate(SIZES * copies):
        image = natural(height, width, number)
        grey = number % 5 == 4
        content = jpeg(image.convert("L")) if grey else jpeg(image, subsampling=number % 3)
        (root / "train" / f"{number:02}.jpg").write_bytes(content)
    return root


def damaged(root: Path) -> Path:
    """Write images; one has a usual header but damaged tables, which no decoder reads."""
    write_images(root)
    path = root / "train" / "03.jpg"
    content = path.read_bytes()
    tables = content.index(b"\xff\xc4")
    path.write_bytes(content[: tables + 5] + b"\xff" * 16 + content[tables + 21 :])
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


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
