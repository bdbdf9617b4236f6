"""One update of the weights: micro-batches, autocast, gradients, optimizer."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mae_et.curriculum.plan import PlannedStage
from mae_et.data.batch import AnyBatch
from mae_et.training.nonfinite import nonfinite_with, skip_update_unless_finite
from mae_et.training.run import Run

Loss = Callable[[Run, PlannedStage, Any, int], Tensor]
"""Mean loss [] of a micro-batch, the n-th of its step from 0: `Task.loss`."""


def train_step(
    run: Run, stage: PlannedStage, batches: Iterable[AnyBatch], loss_of: Loss
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step on the mean loss of a step's micro-batches.

    With `optim.max_skipped_updates` the update is skipped if the loss or the norm is not finite.
    Nothing here waits for the device.

    Returns:
        The loss [] and the gradient norm [] before clipping, on the device.
    """
    state, accumulation = run.state, run.accumulation(stage)
    losses: list[Tensor] = []
    for number, batch in enumerate(batches):
        # Ranks exchange gradients once per step, with the last micro-batch. Sharded models exchange
        # them with each micro-batch, to keep gradients sharded; copies of them, once per step.
        with _exchange(run.network, number == accumulation - 1):
            work = partial(forward_backward, run, stage, loss_of, number)
            if run.graphs is None:
                losses.append(work(batch))
            else:
                losses.append(run.graphs(work, batch, stage.bandwidth, first=number == 0))
    loss = reduce(torch.add, losses)
    if run.flat_gradients is not None:
        run.flat_gradients.average()
    state.scaler.unscale_(state.optimizer)
    norm = get_total_norm([p.grad for p in run.trained if p.grad is not None])
    if isinstance(norm, DTensor):  # sharded: each rank has a part of the sum
        norm = norm.full_tensor()
    if (
        run.config.optim.max_skipped_updates > 0 and not state.scaler.is_enabled()
    ):  # the fp16 scaler skips updates itself
        skip_update_unless_finite(state.optimizer, norm)
    if run.config.optim.clip_grad is not None:
        clip_grads_with_norm_(run.trained, run.config.optim.clip_grad, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return loss, norm


def forward_backward(
    run: Run, stage: PlannedStage, loss_of: Loss, number: int, batch: Any
) -> Tensor:
    """Run forward and backward on a micro-batch; return its part of the step's loss []."""
    loss = loss_of(run, stage, batch, number)
    if (accumulation := run.accumulation(stage)) > 1:
        loss = loss / accumulation
    scaled = run.state.scaler.scale(loss)
    if run.config.optim.max_skipped_updates > 0:
        scaled = nonfinite_with(scaled, loss)
    scaled.backward()
    return loss.detach()


def _exchange(network: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    if isinstance(network, DistributedDataParallel) and not wanted:
        return network.no_sync()
    if isinstance(network, FSDPModule):
        network.set_requires_all_reduce(wanted)
    return nullcontext()
