"""A run: everything that its loop and steps read; only its state changes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.data.bad_images import BadImages
from mae_et.data.sampler import CurriculumBatchSampler
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.signals import StopFlag
from mae_et.training.state import TrainState


@dataclass
class Run:
    """Everything that the loop and its steps read.

    Attributes:
        config: the run's config, with sections `optim`, `output`, `data`, `crop`, `efficiency`.
        plan: stages in whole steps.
        world: rank, number of ranks and device.
        state: what changes while training.
        network: the state's model to call: compiled, and wrapped for several ranks.
        dtype: autocast dtype; None for float32.
        micro_batch: from a bandwidth to the images of one forward pass.
        provenance: hash of the data, number of ranks, where images are decoded
            (`same_data.provenance_of`), and hash of the initial weights.
        stopped: set by a signal that asks to save and stop.
        stop_after_step: number of steps after which to save and stop; None for the plan's.
        compiled: whether the network, or its transformer blocks, are compiled.
        bad_images: images that could not be read; None if the first one stops the run.
    """

    config: Any
    plan: Plan
    world: DistributedContext
    state: TrainState
    network: nn.Module
    dtype: torch.dtype | None
    micro_batch: Callable[[int], int]
    provenance: dict[str, Any] = field(default_factory=dict)
    stopped: StopFlag = field(default_factory=StopFlag)
    stop_after_step: int | None = None
    compiled: bool = False
    bad_images: BadImages | None = None

    def accumulation(self, stage: PlannedStage) -> int:
        """Return the number of micro-batches of one step at a stage."""
        return self.plan.batch_size // self.world.size // self.micro_batch(stage.bandwidth)

    def sampler(self) -> CurriculumBatchSampler:
        """Return the samples of this rank from the state's step to the plan's last."""
        config, world = self.config, self.world
        return CurriculumBatchSampler(
            self.plan,
            config.seed,
            self.micro_batch,
            world.rank,
            world.size,
            self.state.step,
            config.data.replay,
            config.data.replay_images,
        )
