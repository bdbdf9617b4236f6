"""A run: everything that its loop and steps read. It is frozen; only its state changes."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from mae_et.config.duration import Duration, duration_in_steps
from mae_et.config.schema import RunConfig
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.data.sampler import CurriculumBatchSampler
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.signals import StopFlag
from mae_et.training.efficiency.cuda_graphs import GraphedPasses
from mae_et.training.efficiency.flat_gradients import FlatGradients
from mae_et.training.optim import decay_start
from mae_et.training.state import TrainState


@dataclass(frozen=True)
class Run:
    """Everything that the training loop and its steps read.

    Attributes:
        config: the run's config.
        plan: stages in whole steps.
        world: rank, number of ranks and device.
        state: what changes while training.
        network: the model to call: the state's, compiled, and wrapped for several ranks.
        dtype: autocast dtype; None for float32.
        micro_batch: images of one forward pass, by bandwidth.
        provenance: hashes of the data, the initial weights and the code, number of ranks, and
            image decoder (`same_data.check_data`).
        stopped: set by a signal to save and stop.
        stop_after_step: save and stop after this many steps; None to run to the plan's end.
        compiled: whether the network, or its transformer blocks, are compiled.
        short_attention: whether self-attention over short sequences has kernels of our own.
        graphs: replays forward and backward passes as CUDA graphs; None to run them eagerly.
        flat_gradients: exchanges the gradients of replayed passes; None if the network does.
    """

    config: RunConfig
    plan: Plan
    world: DistributedContext
    state: TrainState
    network: nn.Module
    dtype: torch.dtype | None
    micro_batch: dict[int, int]
    provenance: dict[str, Any] = field(default_factory=dict)
    stopped: StopFlag = field(default_factory=StopFlag)
    stop_after_step: int | None = None
    compiled: bool = False
    short_attention: bool = False
    graphs: GraphedPasses | None = None
    flat_gradients: FlatGradients | None = None

    def accumulation(self, stage: PlannedStage) -> int:
        """Return the number of micro-batches of one step at a stage."""
        return self.plan.batch_size // self.world.size // self.micro_batch[stage.bandwidth]

    def in_steps(self, duration: Duration) -> int:
        """Return an interval of the config as a number of steps."""
        return duration_in_steps(duration, self.plan.steps)

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """Trainable parameters, in the model's order; cached, because listing them takes 1 ms."""
        return [p for p in self.state.model.parameters() if p.requires_grad]

    @cached_property
    def decay_start(self) -> int | None:
        """Step at which the learning rate starts to decay, where longer runs can branch off."""
        return decay_start(self.plan, self.config.optim)

    def keeps(self, step: int) -> bool:
        """Return whether the checkpoint after this many steps is kept permanently."""
        every = self.config.output.keep_every
        return step == self.decay_start or (every is not None and step % self.in_steps(every) == 0)

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
