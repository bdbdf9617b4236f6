"""From samples to batches: seeded views, and batches drawn in the order that the plan says.

All randomness is a function of (seed, epoch, sample): crop, flip, augmentation and mask noise. So
the numbers depend neither on the number of workers, nor on where a run was interrupted, nor on how
a global batch is spread over processes and micro-batches.
"""

import contextlib
import hashlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
)
from torchvision.transforms.functional import pil_to_tensor

from mae_et.config import DataConfig
from mae_et.curriculum import Plan
from mae_et.datasets import Source
from mae_et.errors import RunFailed, UserError
from mae_et.signals import STOP_SIGNALS

BICUBIC = InterpolationMode.BICUBIC
WORKER_GRACE_SECONDS = 120
AnyBatch = TypeVar("AnyBatch")


class Draw(NamedTuple):
    """One sample of a batch: which image, in which pass over the data, at which stage."""

    sample: int
    epoch: int
    stage: int


class Batch(NamedTuple):
    """A micro-batch on its way to the device."""

    images: Tensor
    """uint8 [B C H W] at the base size (float32 where the files are)."""
    noise: Tensor
    """float32 [B N]: the mask's noise, on the stage's grid."""


def sample_seed(*key: int) -> int:
    """Return a 63-bit seed that is a function of integers, the same on every machine."""
    digest = hashlib.blake2b(np.asarray(key, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators that image transforms draw from, and put them back afterwards."""
    saved = torch.default_generator.get_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  (timm's RandAugment draws from it)
    try:
        yield
    finally:
        torch.default_generator.set_state(saved[0])
        random.setstate(saved[1])
        np.random.set_state(saved[2])  # noqa: NPY002


class TrainView(Dataset[Batch]):
    """Random views: MAE's random-resized crop and flip, RandAugment at the stage's magnitude."""

    def __init__(self, source: Source, config: DataConfig, plan: Plan, patch: int, seed: int):
        self.source, self.seed = source, seed
        self.patches = [(stage.bandwidth // patch) ** 2 for stage in plan.stages]
        self.transforms = [
            training_transform(config, plan.base, stage.magnitude) for stage in plan.stages
        ]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draw: Draw) -> Batch:
        image, _ = self.source[draw.sample]
        with seeded(sample_seed(self.seed, draw.epoch, draw.sample)):
            view = self.transforms[draw.stage](image)
            noise = torch.rand(self.patches[draw.stage])
        return Batch(as_tensor(view), noise)


class EvalView(Dataset[tuple[Tensor, int]]):
    """Central views with labels: resize, then centre crop (256 to 224 in MAE's recipe)."""

    def __init__(self, source: Source, config: DataConfig, size: int):
        self.source = source
        self.transform = Compose(
            [Resize(round(size / config.eval_crop), BICUBIC, antialias=True), CenterCrop(size)]
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return as_tensor(self.transform(image)), label


def as_tensor(image: Image.Image | Tensor) -> Tensor:
    """Return a PIL image as uint8 [C H W]; a tensor as it is."""
    return image if isinstance(image, Tensor) else pil_to_tensor(image)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return images [B C H W] as float32 with the given statistics; uint8 is taken as [0, 255]."""
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    centre, spread = statistics(mean, std, images.device)
    return (images.float() / scale - centre) / spread


@lru_cache(maxsize=8)
def statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation as tensors [C 1 1].

    They are cached: a copy to the device for each batch would make it wait.
    """
    centre, spread = torch.tensor([mean, std], device=device)[..., None, None]
    return centre, spread


class PlannedBatches(Sampler[list[Draw]]):
    """The plan's batches, for one process, in micro-batches.

    Step s of the run takes the samples s*batch ... (s+1)*batch - 1 of an endless sequence of
    permutations of the data set; process r takes the r-th equal part of each batch. The stage
    travels with each sample, so that workers that fetch ahead always apply the right transform.
    """

    def __init__(
        self,
        plan: Plan,
        seed: int,
        micro_batch: Callable[[int], int],
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ):
        self.plan, self.seed, self.micro_batch = plan, seed, micro_batch
        self.rank, self.world, self.start = rank, world, start

    def __len__(self) -> int:
        share = self.plan.batch_size // self.world
        steps = (
            (max(0, s.start + s.steps - max(s.start, self.start)), self.micro_batch(s.bandwidth))
            for s in self.plan.stages
        )
        return sum(count * (share // micro) for count, micro in steps)

    def __iter__(self) -> Iterator[list[Draw]]:
        share = self.plan.batch_size // self.world
        for step in range(self.start, self.plan.steps):
            stage = self.plan.at(step)
            micro = self.micro_batch(stage.bandwidth)
            first = step * self.plan.batch_size + self.rank * share
            for place in range(first, first + share, micro):
                yield [self._draw(i, stage.index) for i in range(place, place + micro)]

    def _draw(self, place: int, stage: int) -> Draw:
        epoch, offset = divmod(place, self.plan.dataset_size)
        order = permutation(self.plan.dataset_size, self.seed, epoch)
        return Draw(int(order[offset]), epoch, stage)


def micro_batch_size(
    asked: int | dict[int, int] | None, plan: Plan, world: int
) -> Callable[[int], int]:
    """Return a function from a bandwidth to the images of one forward pass of one process.

    It divides a process's share of the batch into equal parts, no larger than what is asked for
    (see `EfficiencyConfig.micro_batch`).

    Raises:
        UserError: the processes do not divide the batch, or other bandwidths are named than the
            curriculum has.
    """
    if plan.batch_size % world:
        raise UserError(f"optim.batch_size {plan.batch_size} is not divided by {world} processes")
    share = plan.batch_size // world
    bandwidths = {stage.bandwidth for stage in plan.stages}
    if isinstance(asked, dict) and set(asked) != bandwidths:
        raise UserError(
            f"efficiency.micro_batch names the bandwidths {sorted(asked)}, the curriculum has "
            f"{sorted(bandwidths)}"
        )

    def size(bandwidth: int) -> int:
        limit = share
        if isinstance(asked, dict):
            limit = min(share, asked[bandwidth])
        elif asked is not None:
            limit = min(share, asked * plan.base**2 // bandwidth**2)
        return next(part for part in range(limit, 0, -1) if share % part == 0)

    return lru_cache(size)


@lru_cache(maxsize=2)
def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the samples in an epoch, int64 [size]."""
    generator = torch.Generator().manual_seed(sample_seed(seed, epoch, -1))
    return torch.randperm(size, generator=generator)


def worker_count(asked: int | None, world: int = 1) -> int:
    """Return the loader processes of one training process: as asked, or its share of the cores."""
    if asked is not None:
        return asked
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(16, max(1, cores // here))


def train_loader(
    view: Dataset[AnyBatch], batches: PlannedBatches, workers: int, pin_memory: bool
) -> DataLoader[AnyBatch]:
    """Return a loader of the plan's micro-batches, from its first step to its last."""
    return DataLoader(
        view,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals,
    )


def eval_loader(
    view: Dataset[tuple[Tensor, int]], batch_size: int, workers: int
) -> DataLoader[Any]:
    """Return a loader of images [B C H W] and labels [B], in order, the last batch short."""
    return DataLoader(
        view, batch_size=batch_size, num_workers=workers, worker_init_fn=_leave_signals
    )


@contextlib.contextmanager
def batches_of(loader: DataLoader[AnyBatch]) -> Iterator[Iterator[AnyBatch]]:
    """Iterate over a loader, and end its processes with the block, however it ends.

    An error keeps the frames that hold the iterator alive, and Python would wait at its exit for
    processes that wait for work.
    """
    batches = iter(loader)
    try:
        yield batches
    finally:
        end = getattr(batches, "_shutdown_workers", None)  # absent without workers
        if end is not None:
            end()


def _leave_signals(worker: int) -> None:
    """Let the training process decide.

    Launchers signal the whole group, and a worker that died of it would take the run along before
    it could save. It dies a while after the request to terminate, should nobody have ended it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_SECONDS))


def _refuse_arrays(image: Image.Image | Tensor) -> Image.Image:
    if isinstance(image, Tensor):
        raise RunFailed("data.augment works on pictures, but the data are arrays")
    return image


def training_transform(config: DataConfig, size: int, magnitude: float) -> Callable:
    """Return random-resized crop, flip and, if asked for, RandAugment of a magnitude.

    Raises:
        UserError: timm knows no such augmentation.
    """
    steps: list[Callable] = [
        RandomResizedCrop(size, config.scale, config.ratio, BICUBIC, antialias=True),
        RandomHorizontalFlip(config.flip),
    ]
    if config.augment:
        name, *rest = config.augment.split("-")
        fill = tuple(round(255 * mean) for mean in config.mean)
        recipe = "-".join([name, f"m{magnitude:g}", *rest])
        try:
            how = {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
            steps.append(rand_augment_transform(recipe, how))
        except (AssertionError, ValueError, KeyError):
            raise UserError(f"timm knows no augmentation {recipe!r} (data.augment)") from None
        steps.insert(-1, _refuse_arrays)
    return Compose(steps)
