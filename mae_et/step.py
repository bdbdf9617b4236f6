"""One update of the weights: micro-batches, autocast, gradients, optimizer."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mae_et.checkpoint import TrainState
from mae_et.config import PretrainConfig
from mae_et.curriculum import Plan, PlannedStage
from mae_et.data import Batch, normalise
from mae_et.distributed import World
from mae_et.frequency import low_frequency_crop
from mae_et.model import MaskedAutoencoder
from mae_et.precision import autocast


@dataclass
class Run:
    """A run: what a step needs, of which only the state changes."""

    config: PretrainConfig
    plan: Plan
    world: World
    state: TrainState
    network: nn.Module
    """The state's model, as it is called: compiled, and wrapped for several processes."""
    dtype: torch.dtype | None
    """Autocast dtype; None for float32."""
    micro_batch: Callable[[int], int]
    """From a bandwidth to the images of one forward pass."""

    def accumulation(self, stage: PlannedStage) -> int:
        """Return the micro-batches of one step."""
        return self.plan.batch_size // self.world.size // self.micro_batch(stage.bandwidth)


def train_step(run: Run, stage: PlannedStage, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
    """Update the weights once; return the loss and the gradient's norm, on the device."""
    config, state, device = run.config, run.state, run.world.device
    accumulation = run.accumulation(stage)
    losses = torch.zeros((), device=device)
    for number, batch in enumerate(batches, start=1):
        images = normalise(
            batch.images.to(device, non_blocking=True), config.data.mean, config.data.std
        )
        images = low_frequency_crop(images, stage.bandwidth, config.crop.method)
        noise = batch.noise.to(device, non_blocking=True)
        # Processes exchange gradients once a step, with the last micro-batch.
        with _no_sync(run.network, number < accumulation):
            with autocast(run.dtype, device):
                loss = run.network(images, config.model.mask_ratio, noise).loss / accumulation
            state.scaler.scale(loss).backward()
        losses += loss.detach()
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.optim.clip_grad is not None:
        clip_grads_with_norm_(parameters, config.optim.clip_grad, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return losses, norm


def wrap(model: MaskedAutoencoder, config: PretrainConfig, plan: Plan, world: World) -> nn.Module:
    """Compile and distribute a model, as far as the config and the world ask for it."""
    network: nn.Module = model
    if config.efficiency.compile:
        # One graph for each bandwidth, none of them with symbolic shapes; past its limit of graphs
        # the compiler would fall back without a word.
        bandwidths = len({stage.bandwidth for stage in plan.stages})
        torch._dynamo.config.recompile_limit = 8 + 2 * bandwidths
        network = torch.compile(network, dynamic=False)  # type: ignore[assignment]
    if world.size > 1:
        devices = [world.device.index] if world.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=devices)
    return network


def _no_sync(network: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    if wanted and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return nullcontext()
