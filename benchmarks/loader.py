"""Measure the images/s that one core loads, with a common loader and this one, at each bandwidth.

    mae-et bench loader --root FOLDER [--shards FOLDER] [--sizes '[96,160,224]'] [--rounds 7]

One process, one thread, no workers. The reference is the loader of most recipes: Pillow,
torchvision's RandomResizedCrop(224, bicubic), flip, ToTensor, Normalize. All arms load the same
images in turn, in rounds; ratios compare two arms of one round. Times are CPU times, so other load
on the machine matters little. Files are in the page cache.

Fidelity is the mean PSNR, in dB, relative to the exact low-frequency crop of the same box; for
Lanczos, as released, the box is first resized to 224.
"""

import io
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import (
    Compose,
    InterpolationMode,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToTensor,
)
from torchvision.transforms.functional import pil_to_tensor

from mae_et import low_frequency_crop
from mae_et.config.commands import PrepareConfig
from mae_et.config.data import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.schedule import Curriculum, Stage
from mae_et.data.cache import cache_images
from mae_et.data.datasets import open_dataset
from mae_et.data.device.encoded import EncodedDataset
from mae_et.data.images import jpeg_crop
from mae_et.data.images.boxes import Box
from mae_et.data.images.decoding import DecodedDataset
from mae_et.data.images.jpeg_crop import coarsest_scale, crop_and_resize, draw_crop, round_box
from mae_et.data.prepare import prepare
from mae_et.data.sampler import SampleIndex
from mae_et.data.sources.image_folder import ImageFolder
from mae_et.data.train_dataset import TrainDataset
from mae_et.errors import require_in
from mae_et.monitoring.tables import markdown_table
from mae_et.runtime.distributed import DistributedContext

from .rounds import Speed, interleave

BASE, PATCH = 224, 16
Load = Callable[[int], object]


def reference(source: ImageFolder) -> Load:
    """Return the common loader of a folder's images."""
    paths = [source.inner.path(index) for index in range(len(source))]
    transform = Compose(
        [
            RandomResizedCrop(BASE, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
            RandomHorizontalFlip(),
            ToTensor(),
            Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def load(index: int) -> Tensor:
        with paths[index].open("rb") as file:
            return transform(Image.open(file).convert("RGB"))

    return load


def arms(source: DecodedDataset, shards: DecodedDataset, size: int) -> dict[str, Load]:
    """Return the variants of this loader."""
    plan = Curriculum((Stage(size, 1),), BASE, PATCH).plan(1, len(source), len(source))

    def view(of: DecodedDataset, method: Any) -> Load:
        samples = TrainDataset(of, DataConfig(), plan, PATCH, 0, method)
        return lambda index: samples[SampleIndex(index, 0, 0)]

    decode = view(source, "decode")
    run = PretrainConfig(data=DataConfig(cache="ram"), efficiency=EfficiencyConfig(num_workers=0))
    world = DistributedContext(0, 1, torch.device("cpu"))
    cached: Any = cache_images(source, run, world)

    def with_pillow(index: int) -> None:
        fast, jpeg_crop.simplejpeg = jpeg_crop.simplejpeg, None
        try:
            decode(index)
        finally:
            jpeg_crop.simplejpeg = fast

    def read_only(of: DecodedDataset) -> Load:
        images = TrainDataset(of, DataConfig(), plan, PATCH, 0)
        encoded = EncodedDataset(images, images)
        return lambda index: encoded.collate([encoded[SampleIndex(index, 0, 0)]])

    return {
        "fourier, resize": view(source, "fourier"),
        "fourier, resize; data.cache ram": view(cached, "fourier"),
        "decode, Pillow": with_pillow,
        "decode": decode,
        "decode, prepared shards": view(shards, "decode"),
        "efficiency.decode gpu, its loader processes": read_only(source),
        "efficiency.decode gpu; data.cache ram, its loader processes": read_only(cached),
    }


def fidelity(
    source: DecodedDataset, shards: DecodedDataset, size: int, images: int
) -> dict[str, float]:
    """Return the PSNR of each variant, in dB."""
    found: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    for index in range(images):
        draw, _ = draw_crop(DataConfig(), generator)
        image = source[index][0]
        assert isinstance(image, Image.Image)
        box = draw(image.height, image.width)
        base, exact = exact_crop(image, box, size)
        small = base.resize((size, size), Image.Resampling.LANCZOS)
        resized = low_frequency_crop(pil_to_tensor(base) / 255, size, "resize") * 255
        found.setdefault("Lanczos, as released", []).append(psnr(pil_to_tensor(small), exact))
        found.setdefault("fourier, resize", []).append(psnr(resized, exact))
        for name, of in (("decode", source), ("decode, prepared shards", shards)):
            content, _, inner = of.read_for_crop(index, draw, size)
            crop = crop_and_resize(content, 3, inner, size)
            _, exact = exact_crop(image, box_read(content, inner, image, size), size)
            found.setdefault(name, []).append(psnr(crop, exact))
    return {name: float(np.mean(values)) for name, values in found.items()}


def box_read(content: bytes, draw: Any, image: Image.Image, size: int) -> Box:
    """Return the box that `crop_and_resize` reads, in pixels of the original."""
    with Image.open(io.BytesIO(content)) as stored:
        width, height = stored.size
    box = draw(height, width)
    scale = coarsest_scale(box, size)
    inside = round_box(box.scaled(1 / scale, 1 / scale), -(-height // scale), -(-width // scale))
    top, left, *sides = (scale * side for side in inside)
    read = Box(top, left, min(sides[0], height - top), min(sides[1], width - left))
    return read.scaled(image.height / height, image.width / width)


def exact_crop(image: Image.Image, box: Box, size: int) -> tuple[Image.Image, Tensor]:
    """Return a box at the base size and its exact low-frequency crop in [0, 255]."""
    right, bottom = box.left + box.width, box.top + box.height
    corners = (box.left, box.top, min(right, image.width), min(bottom, image.height))
    base = image.resize((BASE, BASE), Image.Resampling.BICUBIC, box=corners)
    return base, 255 * low_frequency_crop(pil_to_tensor(base) / 255, size).clamp(0, 1)


def psnr(one: Tensor, other: Tensor) -> float:
    """Return the peak signal-to-noise ratio of images in [0, 255], in dB; 60 at most."""
    error = ((one.float() - other) / 255).square().mean().item()
    return float(-10 * np.log10(max(error, 1e-6)))


def measure(root: Path, prepared: Path, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Measure all arms at all sizes, on a folder of JPEGs and the same images as shards."""
    torch.set_num_threads(1)
    source = open_dataset(DataConfig(root=root), "train")
    shards = open_dataset(DataConfig(name="shards", root=prepared), "train")
    assert isinstance(source, ImageFolder)
    assert isinstance(shards, DecodedDataset)
    images = min(len(source), 200)
    rows = []
    for size in sizes:
        loaders = {"reference": reference(source)} | arms(source, shards, size)
        timed = {name: partial(load_all, load, images) for name, load in loaders.items()}
        speeds = interleave(timed, rounds, clock=time.process_time)
        decibels = fidelity(source, shards, size, images) if size < BASE else {}
        for name in speeds | decibels:
            speed = speeds.get(name)
            rows.append(
                {
                    "size": size,
                    "arm": name,
                    "images_per_second": images / speed.median_seconds if speed else None,
                    "ratios": speed.ratios if speed else (),
                    "psnr": decibels.get(name),
                }
            )
    return rows


def load_all(load: Load, images: int) -> None:
    """Load a number of images."""
    for index in range(images):
        load(index)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    head = ["B", "loader", "images/s a core", "of the reference (min to max)", "PSNR, dB"]
    cells = []
    for row in rows:
        speed = f"{row['images_per_second']:.0f}" if row["images_per_second"] else ""
        fidelity = f"{row['psnr']:.2f}" if row["psnr"] is not None else ""
        ratio = Speed((), row["ratios"]).ratio() if row["ratios"] else ""
        cells.append([str(row["size"]), row["arm"], speed, ratio, fidelity])
    return markdown_table(head, cells)


@dataclass(frozen=True)
class LoaderConfig:
    """Compare the loader with a common one, on one core."""

    root: Path
    """Folder of JPEGs."""
    shards: Path | None = None
    """The same images as prepared shards; by default they are prepared now."""
    sizes: tuple[int, ...] = (96, 160, 224)
    """Bandwidths."""
    rounds: int = 7
    """Number of rounds, after one to warm up."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, "sizes", "rounds")


def bench_loader(config: LoaderConfig) -> dict[str, Any]:
    """Measure loading speed and fidelity against a common loader."""
    with tempfile.TemporaryDirectory() as folder:
        shards = config.shards or Path(folder)
        if config.shards is None:
            prepare(PrepareConfig(shards, DataConfig(root=config.root), splits=("train",)))
        rows = measure(config.root, shards, config.sizes, config.rounds)
    print(table(rows))
    return {"rows": rows}
