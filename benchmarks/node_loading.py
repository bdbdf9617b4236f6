"""Measure every way in which this machine can load a recipe's images."""

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from mae_et.config.commands import PrepareConfig
from mae_et.config.data import DataConfig
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.schedule import Curriculum, Stage
from mae_et.data.cache import cache_images, memory_for
from mae_et.data.datasets import open_dataset
from mae_et.data.device.choose_decoder import choose_decoder
from mae_et.data.evenly_spaced import evenly_spaced
from mae_et.data.loader import CPU, training_batches
from mae_et.data.prepare import prepare
from mae_et.data.sampler import CurriculumBatchSampler
from mae_et.data.sources.image_folder import ImageFolder
from mae_et.data.train_dataset import TrainDataset
from mae_et.errors import UserError, one_line, require
from mae_et.runtime.distributed import DistributedContext

from .node_training import step_beside

SAMPLE, MADE = 512, 64
SIZE = 256
"""Images of a micro-batch that a GPU decodes; the sample has about as many."""
LOADED = 64
"""Images of a micro-batch that loader processes decode for a GPU: 16 processes take seconds for 256
each, longer than the time of a way."""
GPU_DECODES = "--efficiency.decode=gpu"
PATIENCE = 90.0
"""Seconds in which the processes of all GPUs must have started."""


class Way(NamedTuple):
    """A way of loading."""

    name: str
    data: DataConfig
    crop: str
    decode: str
    flags: list[str]
    """Flags of a run that loads in this way."""
    by_bandwidth: bool = True
    """Whether its speed depends on the bandwidth."""


Beside = Callable[[int, int], Callable[[], object]]
"""Builds a training step from a bandwidth and a number of images."""


def loading_speeds(
    config: PretrainConfig,
    plan: Plan,
    device: torch.device,
    workers: int,
    seconds: float,
    gpus: int = 1,
) -> list[dict[str, Any]]:
    """Time each way of loading on all GPUs at once, at each bandwidth.

    GPUs share the cores, their clocks, the memory and the storage of a machine. The speed is that
    of the slowest one, which all others wait for in a run. A folder is sampled, and read from the
    page cache; without data, JPEGs of noise are generated. Decoding on the GPU is timed during
    training steps of as many images, because each slows the other. Images in memory are measured if
    all of the plan's fit there. `workers` are a GPU's loader processes, `seconds` limit the total.

    Returns:
        Rows of `way`, `bandwidth` (None if it does not matter), `images_per_second` of a GPU (None
        if not measured, with the `reason`), and the `flags` of a run that loads so.
    """
    bandwidths = plan.bandwidths
    rows: list[dict[str, Any]] = []
    with _ways(config) as ways, _measuring(config, device, gpus) as measure:
        ends = time.monotonic() + seconds
        each = [(way, b) for way in ways for b in (bandwidths if way.by_bandwidth else [None])]
        for number, (way, bandwidth) in enumerate(each):
            left = (ends - time.monotonic()) / (len(each) - number)
            speed, reason = None, "no time"
            try:
                if left > 0:
                    b = bandwidth or plan.base
                    speed = measure(config, way, plan, b, workers, left)
            except UserError as error:
                reason = str(error)
            except BrokenProcessPool:
                reason = "a process of one of the GPUs died; see the lines above"
            except RuntimeError as error:  # of a library or the GPU, which other ways may not need
                reason = one_line(error)[:200]
            row = {"way": way.name, "bandwidth": bandwidth, "images_per_second": speed}
            rows.append(row | ({} if speed else {"reason": reason}) | {"flags": way.flags})
    return rows


@contextlib.contextmanager
def _ways(config: PretrainConfig) -> Iterator[list[Way]]:
    """Yield the ways of loading that the config's images allow."""
    data = dataclasses.replace(config.data, augment=None, replay=None)
    crop, decode = ["--crop.method=decode"], [GPU_DECODES]

    def in_memory(images: DataConfig) -> list[Way]:
        kept, flags = dataclasses.replace(images, cache="ram"), ["--data.cache=ram"]
        return [
            Way("memory, fourier", kept, "fourier", "cpu", flags, by_bandwidth=False),
            Way("memory, GPU", kept, "fourier", "gpu", [*flags, *decode]),
        ]

    if data.source not in ("folder", "synthetic"):
        name = data.source
        yield [
            Way(f"{name}, fourier", data, "fourier", "cpu", [], by_bandwidth=False),
            Way(f"{name}, decode", data, "decode", "cpu", crop),
            Way(f"{name}, GPU", data, "fourier", "gpu", decode),
            *in_memory(data),
        ]
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        (root / "train").mkdir(parents=True)
        if data.root is None:
            _make(root / "train")
        else:
            _link(data, config.model.channels, root / "train")
        files = dataclasses.replace(data, name="folder", root=root, train_split="train")
        shards = Path(folder) / "shards"
        prepare(
            PrepareConfig(
                shards, files, config.model.channels, splits=("train",),
                num_workers=min(8, os.cpu_count() or 1), shard_images=64,
            )
        )  # fmt: skip
        prepared = dataclasses.replace(files, name="shards", root=shards)
        from_shards = ["--data.name=shards", "--data.root=SHARDS", *crop]
        yield [
            Way("files, fourier", files, "fourier", "cpu", [], by_bandwidth=False),
            Way("files, GPU", files, "fourier", "gpu", decode),
            Way("files, decode", files, "decode", "cpu", crop),
            Way("prepared shards, decode", prepared, "decode", "cpu", from_shards),
            Way("prepared shards, GPU", prepared, "decode", "gpu", [*from_shards, *decode]),
            *in_memory(files),
        ]  # fmt: skip


def _link(data: DataConfig, channels: int, folder: Path) -> None:
    """Link evenly spaced files of a dataset."""
    source = open_dataset(data, "train", channels)
    assert isinstance(source, ImageFolder)
    for number in evenly_spaced(len(source), SAMPLE):
        path = source.inner.path(number).absolute()
        (folder / f"{number:08}{path.suffix}").symlink_to(path)


def _make(folder: Path) -> None:
    """Write JPEGs of 500 x 375 pixels, with the spectrum of photographs."""
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None])
    for number in range(MADE):
        noise = np.random.default_rng(number).standard_normal((3, 375, 500))
        field = np.fft.irfft2(np.fft.rfft2(noise) / np.maximum(frequency, 1 / 500), s=(375, 500))
        pixels = (128 + 42 * field / field.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number:03}.jpg", quality=95)


@contextlib.contextmanager
def _measuring(
    config: PretrainConfig, device: torch.device, gpus: int
) -> Iterator[Callable[..., float | None]]:
    """Yield a function that measures a way on all GPUs at once, in one process each."""
    if gpus == 1:
        yield partial(_speed, device, _steps(config, device))
        return
    context = get_context("spawn")
    numbers, ready = context.SimpleQueue(), context.Barrier(gpus)
    for number in range(gpus):
        numbers.put(number)
    started = (config, device.type, numbers, ready)
    with ProcessPoolExecutor(gpus, context, _start, started) as pool:

        def slowest(*arguments: Any) -> float | None:
            found = [pool.submit(_speed_here, *arguments) for _ in range(gpus)]
            wait(found)
            return min(each.result() or 0.0 for each in found) or None

        yield slowest


_here: tuple[torch.device, Beside | None]
"""The GPU of this process, and its training steps."""


def _start(config: PretrainConfig, kind: str, numbers: Any, ready: Any) -> None:
    """Give this process a GPU, and wait for the others; only the first prints."""
    global _here
    number = numbers.get()
    device = torch.device(kind, number) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    os.environ["RANK"] = str(number)  # read by `notify`
    _here = device, _steps(config, device)
    ready.wait(PATIENCE)


def _speed_here(*arguments: Any) -> float | None:
    return _speed(*_here, *arguments)


def _steps(config: PretrainConfig, device: torch.device) -> Beside | None:
    return step_beside(config, device) if device.type == "cuda" else None


def _speed(
    device: torch.device, beside: Beside | None, config: PretrainConfig, way: Way, plan: Plan,
    bandwidth: int, workers: int, seconds: float,
) -> float | None:  # fmt: skip
    """Return the images/s of a way, once its processes have started; None if there is no time."""
    source = open_dataset(way.data, "train", config.model.channels)
    if way.data.cache == "ram":
        _, too_large = memory_for(source, plan.dataset_size)
        require(not too_large, too_large)
        kept = dataclasses.replace(
            config, data=way.data, efficiency=EfficiencyConfig(num_workers=workers)
        )
        source = cache_images(source, kept, DistributedContext(0, 1, CPU))
    on_gpu = SIZE if way.decode == "gpu" else LOADED
    size = min(16 if device.type == "cpu" else on_gpu, len(source))
    patch = config.model.patch
    stage = Curriculum((Stage(bandwidth, 1),), plan.base, patch)
    endless = stage.plan(10**6 * size / len(source), len(source), size, lambda _: 1.0)
    crop: Any = way.crop
    dataset = TrainDataset(source, way.data, endless, patch, config.seed, crop)
    decode: Any = way.decode
    decoder = choose_decoder(decode, dataset, DistributedContext(0, 1, device))
    step = beside(bandwidth, size) if beside and way.decode == "gpu" else lambda: None
    step()  # the first step allocates memory and captures its passes
    sampler = CurriculumBatchSampler(endless, config.seed, size)
    with training_batches(dataset, sampler, workers, device, decoder=decoder) as batches:
        ready = time.perf_counter() + seconds / 2
        prefetched = 2 * workers + 2  # batches made while processes started
        while prefetched and time.perf_counter() < ready:
            next(batches)
            prefetched -= 1
        started, count = time.perf_counter(), 0
        while not count or time.perf_counter() < ready + seconds / 2:
            next(batches)
            step()
            count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return count * size / (time.perf_counter() - started) if count > prefetched else None
