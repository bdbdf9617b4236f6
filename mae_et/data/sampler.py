"""Sample the batches of a plan, and choose the images that replay reuses.

The order is a function of (seed, step): it does not depend on where a run was interrupted, on the
number of workers, nor, without replay, on how a batch is spread over ranks.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from mae_et.curriculum.plan import Plan, PlannedStage, check_replay
from mae_et.errors import UserError, require

_REPLAY = -2  # separates replay's seeds from those of permutations


class SampleIndex(NamedTuple):
    """Index of one sample: the image, the epoch and the stage of the curriculum."""

    sample: int
    epoch: int
    stage: int


class StepSamples(NamedTuple):
    """The samples of one step on one rank."""

    step: int
    stage: PlannedStage
    loaded: list[SampleIndex]
    """Samples to load."""
    used: list[SampleIndex]
    """Samples to train on: new ones, then reused ones."""
    new: int
    """Number of new samples in `used`."""
    dropped: list[SampleIndex]
    """Samples that no later step uses."""


def sample_seed(*key: int) -> int:
    """Hash integers to a 63-bit seed, the same on every machine."""
    digest = hashlib.blake2b(np.asarray(key, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@lru_cache(maxsize=2)
def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the samples in an epoch, int64 [size]."""
    generator = torch.Generator().manual_seed(sample_seed(seed, epoch, -1))
    return torch.randperm(size, generator=generator)


class CurriculumBatchSampler(Sampler[list[SampleIndex]]):
    """Batch sampler of a curriculum, for `torch.utils.data.DataLoader(batch_sampler=...)`.

    It yields lists of `SampleIndex` (image, epoch, stage), which the dataset must accept as
    indices: the stage travels with each sample, so that loader processes that prefetch apply the
    transform of the right stage (`mae_et.train_transform`).

    Step s takes the samples s * batch ... (s + 1) * batch - 1 of an endless sequence of
    permutations of the dataset; rank r takes the r-th equal part of each batch. The order is a
    function of (seed, step), so a loop resumes at any step with `start_step`.

    It distributes the samples itself, so nothing else may: with accelerate, do not `prepare` the
    loader (each rank would get every second batch, of another stage); with Lightning and Fabric,
    set `use_distributed_sampler=False`.

    With replay (EfficientTrain++, arXiv 2405.08768, for slow loaders), a step at a bandwidth with
    `replay` t loads 1/t of its batch and draws the rest from the samples that this rank loaded last
    in the same stage; `mae_et.data.loader.training_batches` combines them.

    Args:
        plan: stages in whole steps, from `Curriculum.plan`.
        seed: seed of the order.
        micro_batch: images of one forward pass of this rank: a number, or one by bandwidth; by
            default, and at most, a rank's whole share of the batch, which it divides: the mean over
            a step's lists then weights all images alike.
        rank: index of this rank.
        world_size: number of ranks.
        start_step: first step.
        replay: number of uses of each loaded sample, by bandwidth; 1 by default.
        replay_images: samples that a rank keeps to draw from.

    Raises:
        UserError: there is no such rank or step; `micro_batch` is not positive, does not divide a
            rank's share of the batch or lacks a bandwidth of the plan; `replay` names one that is
            not in the plan; or the batch is not divisible by the ranks and the uses of an image.
    """

    def __init__(
        self,
        plan: Plan,
        seed: int = 0,
        micro_batch: Mapping[int, int] | int | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        replay: Mapping[int, int] | None = None,
        replay_images: int = 0,
    ):
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is not one of the {world_size} ranks from 0")
        if plan.batch_size % world_size:
            raise UserError(
                f"optim.batch_size {plan.batch_size} is not divisible by {world_size} ranks"
            )
        if not 0 <= start_step <= plan.steps:
            raise UserError(f"start_step {start_step} is outside the plan's {plan.steps} steps")
        share = plan.batch_size // world_size
        if not isinstance(micro_batch, Mapping):
            size = share if micro_batch is None else micro_batch
            micro_batch = dict.fromkeys(plan.bandwidths, size)
        lacking = sorted(set(plan.bandwidths) - micro_batch.keys())
        require(not lacking, f"micro_batch lacks the bandwidths {lacking}")
        smallest = min(micro_batch.values())
        require(smallest > 0, f"micro_batch must be positive, got {smallest}")
        uneven = next((size for size in micro_batch.values() if share % min(size, share)), None)
        require(
            uneven is None, f"micro_batch {uneven} does not divide the {share} images of a rank"
        )
        self.micro_batch = micro_batch
        self.plan, self.seed = plan, seed
        self.rank, self.world_size, self.start_step = rank, world_size, start_step
        self.replay = dict(replay or {})
        # At most an epoch of this rank, so that draws come from at most two permutations.
        self.replay_images = min(replay_images, plan.dataset_size // world_size)
        require(not self.replay or replay_images > 0, "replay needs replay_images to draw from")
        check_replay(plan, self.replay, world_size)
        counts = (stage.steps * self._share(stage) * world_size for stage in plan.stages)
        self._before = [0, *accumulate(counts)]

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        for step in self.steps():
            yield from chunks(step.loaded, self.micro_batch[step.stage.bandwidth])

    def __len__(self) -> int:
        """Return the number of lists of samples from `start_step` on: micro-batches of a rank."""
        count = 0
        for stage in self.plan.stages:
            done = min(max(self.start_step - stage.start, 0), stage.steps)
            count += (stage.steps - done) * self._lists(self._share(stage), stage)
        for step in self.steps():  # a resumed stage loads again what it still draws from
            taken = (step.step + 1 - self.start_step) * step.new
            if step.stage.start >= self.start_step or taken >= self.replay_images:
                break
            count += self._lists(len(step.loaded), step.stage) - self._lists(step.new, step.stage)
        return count

    def replays(self, stage: PlannedStage) -> bool:
        """Return whether a stage reuses samples."""
        return self._times(stage) > 1

    def steps(self) -> Iterator[StepSamples]:
        """Yield the samples of each step, from `start_step` to the plan's last."""
        held: set[SampleIndex] = set()
        for step in range(self.start_step, self.plan.steps):
            stage = self.plan.at(step)
            last = (step - stage.start + 1) * self._share(stage)
            new = self._samples(np.arange(last - self._share(stage), last), stage)
            if not self.replays(stage):
                yield StepSamples(step, stage, new, new, len(new), [])
                continue
            first = max(0, last - self.replay_images)
            generator = torch.Generator()
            generator.manual_seed(sample_seed(self.seed, step, self.rank, _REPLAY))
            count = (self._times(stage) - 1) * len(new)
            places = torch.randint(first, last, (count,), generator=generator).numpy()
            again = self._samples(places, stage)
            loaded = list(dict.fromkeys(index for index in new + again if index not in held))
            held.update(loaded)
            following = min(last, max(0, last + len(new) - self.replay_images))
            if step + 1 == stage.start + stage.steps:
                following = last
            # If a step has more new samples than are kept, some are never drawn.
            oldest = min(first, last - len(new))
            leaving = self._samples(np.arange(oldest, following), stage)
            dropped = [index for index in leaving if index in held]  # some were not reloaded
            held.difference_update(dropped)
            yield StepSamples(step, stage, loaded, new + again, len(new), dropped)

    def _lists(self, samples: int, stage: PlannedStage) -> int:
        """Return the number of micro-batches of a step that loads this many samples."""
        return -(-samples // self.micro_batch[stage.bandwidth])

    def _times(self, stage: PlannedStage) -> int:
        return self.replay.get(stage.bandwidth, 1)

    def _share(self, stage: PlannedStage) -> int:
        """Return the number of new samples of a step on this rank."""
        return self.plan.batch_size // self._times(stage) // self.world_size

    def _samples(self, places: np.ndarray, stage: PlannedStage) -> list[SampleIndex]:
        """Return the samples at positions in this rank's sequence of a stage."""
        share, size = self._share(stage), self.plan.dataset_size
        steps, offsets = np.divmod(places, share)
        before = (steps * self.world_size + self.rank) * share + offsets
        epochs, in_epoch = np.divmod(self._before[stage.index] + before, size)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            order, part = permutation(size, self.seed, epoch).numpy(), epochs == epoch
            samples[part] = order[in_epoch[part]]
        pairs = zip(samples.tolist(), epochs.tolist(), strict=True)
        return [SampleIndex(*pair, stage.index) for pair in pairs]


def chunks(samples: list[SampleIndex], size: int) -> Iterator[list[SampleIndex]]:
    """Split a list into parts of `size`; the last one may be shorter."""
    for first in range(0, len(samples), size):
        yield samples[first : first + size]
