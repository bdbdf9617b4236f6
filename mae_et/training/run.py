"""A run: what its steps need, of which only the state changes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mae_et.checkpoints.store import TrainState
from mae_et.config.schema import EfficiencyConfig
from mae_et.curriculum.schedule import Plan, PlannedStage
from mae_et.data.bad_images import BadImages
from mae_et.runtime.distributed import DistributedContext


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
