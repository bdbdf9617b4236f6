"""Build a run: move the model, make its optimizer, fit micro-batches, restore, wrap."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mae_et.checkpoints.state_dicts import describe_mismatch
from mae_et.curriculum.plan import Plan
from mae_et.errors import UserError
from mae_et.runtime.broadcast import broadcast_tensors
from mae_et.runtime.console import notify
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import allow_tf32, autocast_dtype
from mae_et.runtime.signals import StopFlag
from mae_et.training.efficiency.attention import shorten_attention
from mae_et.training.efficiency.compile import compile_network, should_compile
from mae_et.training.efficiency.cuda_graphs import GraphedPasses, should_replay
from mae_et.training.efficiency.flat_gradients import FlatGradients
from mae_et.training.efficiency.fsdp import shard
from mae_et.training.efficiency.micro_batch import fit_micro_batch
from mae_et.training.plan import micro_batch_size
from mae_et.training.resume.same_ranks import check_same_start
from mae_et.training.run import Run
from mae_et.training.state import TrainState
from mae_et.training.task import Task


def build_run(
    task: Task,
    model: nn.Module,
    plan: Plan,
    world: DistributedContext,
    saved: dict[str, Any] | None = None,
    stopped: StopFlag | None = None,
    stop_after_step: int | None = None,
) -> Run:
    """Build a task's run around its model on the CPU, new or restored from a checkpoint."""
    check_same_start(model if saved is None else None, plan, world)
    config, efficiency = task.config, task.config.efficiency
    allow_tf32(efficiency.tf32, world.device)
    dtype = autocast_dtype(efficiency.precision, world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    shards = efficiency.sharding != "none" and world.size > 1
    if efficiency.sharding != "none" and not shards:
        notify(f"efficiency.sharding {efficiency.sharding}: nothing is sharded on one rank")
    if shards and scaler.is_enabled():
        raise UserError("efficiency.sharding needs efficiency.precision bf16 or fp32")
    requested = efficiency.micro_batch
    if requested is None and task.fits_by_default and world.device.type == "cuda" and not shards:
        requested = "auto"
    fitting = requested == "auto"
    if fitting or not shards:  # shards move block by block: one GPU may not hold the whole model
        model = model.to(world.device)
    short = efficiency.attention == "short" and shorten_attention(model, dtype, world)
    ema = None if task.ema_decay is None else ModelEmaV3(model, decay=task.ema_decay)
    state = TrainState(model, task.build_optimizer(model), scaler, ema=ema)
    if saved is not None and (mismatch := describe_mismatch(saved["model"], model.state_dict())):
        raise UserError(f"{saved['path']} does not fit the model: {mismatch}")
    graphs = None
    if should_replay(efficiency, world.device, task.replayable):
        trained = [p for p in model.parameters() if p.requires_grad]
        graphs = GraphedPasses(trained, efficiency.cuda_graphs is True, world)
    run = Run(
        config, plan, world, state, model, dtype, micro_batch_size(requested, plan, world.size),
        stopped=stopped or StopFlag(), stop_after_step=stop_after_step, graphs=graphs,
        short_attention=short,
    )  # fmt: skip
    if fitting:
        multiple = task.divisor_of_micro_batches(model)
        fitted = fit_micro_batch(run, saved, partial(task.dry_pass, run), multiple)
        run = replace(run, micro_batch=fitted)
    task.check_micro_batches(model, [run.micro_batch[stage.bandwidth] for stage in plan.stages])
    if shards:
        # FSDP replaces the parameters, so the optimizer is built again.
        shard(model, world, dtype, within_nodes=efficiency.sharding == "hybrid")
        state.optimizer, state.sharded = task.build_optimizer(model), True
    if saved is not None:
        if saved.get("optimizer_on_main") and not shards:
            optimizer = broadcast_tensors(saved["optimizer"], world, world.device)
            saved = saved | {"optimizer": optimizer}
        state.restore(saved)
    return wrap(run)


def wrap(run: Run) -> Run:
    """Compile a run's network, and prepare ranks to exchange gradients.

    Each only if the config and the number of ranks require it.
    """
    network, plan, world, efficiency = run.network, run.plan, run.world, run.config.efficiency
    compiled = should_compile(efficiency.compile, plan, world)
    if compiled:
        network = compile_network(network, len(plan.bandwidths))
    flat_gradients = None
    if run.graphs is not None:
        flat_gradients = FlatGradients(run.trained, world)
    elif world.size > 1 and efficiency.sharding == "none":
        devices = [world.device.index] if world.device.type == "cuda" else None
        # Gradients live in the buckets that are exchanged, rather than beside them. A static graph
        # avoids the search for unused weights, but torch's reducer fails on it (internal assert in
        # expect_autograd_hooks_, torch 2.14) if the first of several backward passes of a run's
        # first step has no exchange.
        accumulates = any(run.accumulation(stage) > 1 for stage in plan.stages)
        network = DistributedDataParallel(
            network,
            device_ids=devices,
            gradient_as_bucket_view=True,
            static_graph=not accumulates,
        )
        # Buffers are constants, or running statistics: rank 0's are saved, and broadcast to score.
        # Set afterwards: torch 2.13 renamed the argument, which would not send them here either.
        network.broadcast_buffers = False
    return replace(run, network=network, compiled=compiled, flat_gradients=flat_gradients)
