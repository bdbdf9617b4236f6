"""A run: what its steps need, of which only the state changes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mae_et.config.schema import EfficiencyConfig
from mae_et.curriculum.schedule import Plan, PlannedStage
from mae_et.data.bad_images import BadImages
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.fsdp import (
    full_optimizer_state_dict,
    full_state_dict,
    load_full_optimizer_state_dict,
    load_full_state_dict,
)


@dataclass
class TrainState:
    """All that changes while training; everything else is a function of the config and the step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    seconds: float = 0.0
    ema: nn.Module | None = None
    """Moving average of the model, of runs that keep one."""
    micro_batch: dict[int, int] | None = None
    """Images of one forward pass at each bandwidth, where they were fitted to the memory: sums are
    of as many parts again when the run goes on."""

    sharded: bool = False
    """Whether model and optimizer lie in shards; they are saved in one piece all the same."""

    def to_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain types; where it is sharded, every process must ask.

        Only the main process then gets all of it.
        """
        if self.sharded:
            model = full_state_dict(self.model)
            optimizer = full_optimizer_state_dict(self.model, self.optimizer)
        else:
            model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "ema": None if self.ema is None else self.ema.state_dict(),
            "micro_batch": self.micro_batch,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `to_dict`."""
        if self.sharded:
            load_full_state_dict(self.model, saved["model"])
            load_full_optimizer_state_dict(self.model, self.optimizer, saved["optimizer"])
        else:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"] and self.scaler.is_enabled():  # empty of a run that was not in fp16
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict(saved["ema"])
        self.step, self.seconds = saved["step"], saved["seconds"]


@dataclass
class Run:
    """What the loop and its steps read."""

    config: Any
    """The run's config: one with `optim`, `output`, `data`, `crop`, `efficiency` and `seed`."""
    plan: Plan
    world: DistributedContext
    state: TrainState
    network: nn.Module
    """The state's model, as it is called: compiled, and wrapped for several processes."""
    dtype: torch.dtype | None
    """Autocast dtype; None for float32."""
    micro_batch: Callable[[int], int]
    """From a bandwidth to the images of one forward pass."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What the numbers come from beside the config: see `same_run.provenance_of`."""
    unread: BadImages | None = None
    """Images that could not be read; None where the first one stops the run."""

    def accumulation(self, stage: PlannedStage) -> int:
        """Return the micro-batches of one step."""
        return self.plan.batch_size // self.world.size // self.micro_batch(stage.bandwidth)


def wrap(
    model: nn.Module,
    efficiency: EfficiencyConfig,
    plan: Plan,
    world: DistributedContext,
    micro_batch: Callable[[int], int],
) -> nn.Module:
    """Compile and distribute a model, as far as the config and the world ask for it."""
    network = model
    if efficiency.compile:
        # One graph for each bandwidth, none of them with symbolic shapes; past its limit of graphs
        # the compiler would fall back without a word.
        bandwidths = len({stage.bandwidth for stage in plan.stages})
        torch._dynamo.config.recompile_limit = 8 + 2 * bandwidths
        network = torch.compile(network, dynamic=False)  # type: ignore[assignment]
    if world.size > 1 and efficiency.sharding == "none":
        devices = [world.device.index] if world.device.type == "cuda" else None
        # Gradients live in the buckets that are exchanged, rather than beside them. A static graph
        # spares the search for unused weights, but torch's reducer fails on it (internal assert in
        # expect_autograd_hooks_, torch 2.14) where the first backward pass of a run is one of
        # several, without an exchange.
        share = plan.batch_size // world.size
        accumulates = any(micro_batch(stage.bandwidth) < share for stage in plan.stages)
        network = DistributedDataParallel(
            network,
            device_ids=devices,
            gradient_as_bucket_view=True,
            static_graph=not accumulates,
        )
    return network
