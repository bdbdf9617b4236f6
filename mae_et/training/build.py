"""Build a run: move the model, make its optimizer, fit micro-batches, restore, wrap."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mae_et.checkpoints.state_dicts import describe_mismatch
from mae_et.config.schema import RunConfig
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.errors import UserError
from mae_et.runtime.broadcast import broadcast_tensors
from mae_et.runtime.console import notify
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.precision import allow_tf32, autocast_dtype
from mae_et.training.efficiency.compile import compile_network, should_compile
from mae_et.training.efficiency.cuda_graphs import GraphedPasses, should_replay
from mae_et.training.efficiency.flat_gradients import FlatGradients
from mae_et.training.efficiency.fsdp import shard
from mae_et.training.efficiency.micro_batch import fit_micro_batch
from mae_et.training.plan import micro_batch_size
from mae_et.training.resume.same_ranks import check_same_start
from mae_et.training.run import Run
from mae_et.training.state import TrainState


def build_run(
    config: RunConfig,
    plan: Plan,
    world: DistributedContext,
    model: nn.Module,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    dry_pass: Callable[[Run, PlannedStage, int], None],
    saved: dict[str, Any] | None,
    ema_decay: float | None = None,
    multiple: int = 1,
    fit_by_default: bool = False,
    static: bool = False,
) -> Run:
    """Build a run around a model on the CPU, new or restored from a checkpoint.

    To measure the memory of a pass (`efficiency.micro_batch: auto`), `dry_pass` runs forward and
    backward on a number of black images at a stage. With `fit_by_default`, micro-batches on a GPU
    are fitted unless the config gives a size; fitted ones are divisible by `multiple`. If passes
    are `static`, all doing the same work, CUDA graphs can replay them.
    """
    check_same_start(model if saved is None else None, plan, world)
    efficiency = config.efficiency
    allow_tf32(efficiency.tf32, world.device)
    dtype = autocast_dtype(efficiency.precision, world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    shards = efficiency.sharding != "none" and world.size > 1
    if efficiency.sharding != "none" and not shards:
        notify(f"efficiency.sharding {efficiency.sharding}: nothing is sharded on one rank")
    if shards and scaler.is_enabled():
        raise UserError("efficiency.sharding needs efficiency.precision bf16 or fp32")
    requested = efficiency.micro_batch
    if requested is None and fit_by_default and world.device.type == "cuda" and not shards:
        requested = "auto"
    fitting = requested == "auto"
    if fitting or not shards:  # shards move block by block: one GPU may not hold the whole model
        model = model.to(world.device)
    ema = None if ema_decay is None else ModelEmaV3(model, decay=ema_decay)
    state = TrainState(model, optimizer_of(model), scaler, ema=ema)
    if saved is not None and (mismatch := describe_mismatch(saved["model"], model.state_dict())):
        raise UserError(f"{saved['path']} does not fit the model: {mismatch}")
    micro_batch = micro_batch_size(requested, plan, world.size)
    run = Run(config, plan, world, state, model, dtype, micro_batch)  # not wrapped yet
    run.replays = should_replay(efficiency, world.device, static)
    if fitting:
        fit_micro_batch(run, saved, partial(dry_pass, run), multiple)
    if shards:
        # FSDP replaces the parameters, so the optimizer is built again.
        shard(model, world, dtype, within_nodes=efficiency.sharding == "hybrid")
        state.optimizer, state.sharded = optimizer_of(model), True
    if saved is not None:
        if saved.get("optimizer_on_main") and not shards:
            optimizer = broadcast_tensors(saved["optimizer"], world, world.device)
            saved = saved | {"optimizer": optimizer}
        state.restore(saved)
    run.network = wrap(run)
    return run


def wrap(run: Run) -> nn.Module:
    """Compile a run's model, and replay its passes or wrap it in DistributedDataParallel.

    Each only if the config and the number of ranks require it.
    """
    network, plan, world, efficiency = run.network, run.plan, run.world, run.config.efficiency
    run.compiled = should_compile(efficiency.compile, plan, world)
    if run.compiled:
        network = compile_network(network, len(plan.bandwidths))
    if run.replays:
        run.graphs = GraphedPasses(run.trained, efficiency.cuda_graphs is True, world)
        run.flat_gradients = FlatGradients(run.trained, world)
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
    return network
