"""Micro-batches: their sizes as configured, or the largest that fit in memory.

To fit them, a forward and backward pass on zeros runs at two small sizes; the difference of their
peaks gives the memory of an image. Network, gradients and generators are restored afterwards.
"""

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.distributed as dist

from mae_et.curriculum.schedule import Plan, PlannedStage
from mae_et.errors import RunFailed, UserError
from mae_et.training.memory import available_memory, peak_of, without_trace
from mae_et.training.run import Run

MARGIN = 0.1
"""Fraction of the memory to leave free, for what two sizes do not show."""

Attempt = Callable[[PlannedStage, int], None]
"""Forward and backward pass over a number of images at a stage."""


def micro_batch_size(
    requested: int | dict[int, int] | Literal["auto"] | None, plan: Plan, world: int
) -> Callable[[int], int]:
    """Return a function from a bandwidth to the images of one forward pass of one rank.

    The size divides a rank's share of the batch and is at most the requested one
    (`EfficiencyConfig.micro_batch`). With `auto` it is the whole share until it is fitted.

    Raises:
        UserError: the batch is not divisible by the number of ranks, or `requested` names other
            bandwidths than the curriculum's.
    """
    if plan.batch_size % world:
        raise UserError(f"optim.batch_size {plan.batch_size} is not divisible by {world} ranks")
    share = plan.batch_size // world
    bandwidths = {stage.bandwidth for stage in plan.stages}
    if isinstance(requested, dict) and set(requested) != bandwidths:
        raise UserError(
            f"efficiency.micro_batch names the bandwidths {sorted(requested)}, the curriculum has "
            f"{sorted(bandwidths)}"
        )

    def size(bandwidth: int) -> int:
        limit = share
        if isinstance(requested, dict):
            limit = min(share, requested[bandwidth])
        elif isinstance(requested, int):
            limit = min(share, requested * plan.base**2 // bandwidth**2)
        return next(part for part in range(limit, 0, -1) if share % part == 0)

    return lru_cache(size)


def fit_micro_batch(
    run: Run, saved: dict[str, Any] | None, attempt: Attempt, multiple: int = 1
) -> None:
    """Set a run's micro-batches: those of its checkpoint, or else the largest that fit.

    Args:
        run: the run, whose network is neither compiled nor wrapped yet.
        saved: the checkpoint that it goes on from.
        attempt: a pass through that network.
        multiple: what sizes must be multiples of, if a process's share of the batch is one.

    Raises:
        RunFailed: the smallest part does not fit.
    """
    kept = saved and saved.get("micro_batch")
    run.state.micro_batch = kept or fitted_micro_batch(run, attempt, multiple)
    run.micro_batch = micro_batch_size(run.state.micro_batch, run.plan, run.world.size)


def fitted_micro_batch(run: Run, attempt: Attempt, multiple: int) -> dict[int, int]:
    """Return the images of one forward pass at each bandwidth, the same on every process."""
    world, network, share = run.world, run.network, run.plan.batch_size // run.world.size
    parts = [size for size in range(1, share + 1) if share % size == 0 and size % multiple == 0]
    limit = int(available_memory(world) * (1 - MARGIN)) - optimizer_bytes(run)
    sizes = {}
    stages = {stage.bandwidth: stage for stage in run.plan.stages}
    with without_trace(network):
        # Sums of gradients are there before, as in every pass but the first: what a pass takes on
        # top of them grows in a line with its images.
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        for bandwidth, stage in sorted(stages.items()):

            def peak(size: int, stage: PlannedStage = stage) -> int | None:
                return peak_of(lambda: attempt(stage, size), world.device)

            if parts:
                peak(parts[0])  # libraries take their workspaces with the first pass, for good
            sizes[bandwidth] = largest_part(peak, parts, limit) if parts else share
    chosen = torch.tensor(list(sizes.values()))
    if world.size > 1:
        dist.all_reduce(chosen, dist.ReduceOp.MIN)
    if not chosen.all():
        bandwidth = next(b for b, size in zip(sizes, chosen.tolist(), strict=True) if not size)
        raise RunFailed(
            f"efficiency.micro_batch auto: at bandwidth {bandwidth} the smallest part of the batch "
            f"does not fit in memory ({max(limit, 0) / 2**30:.2f} GiB are left for a pass); try "
            "efficiency.gradient_checkpointing"
        )
    sizes = dict(zip(sizes, chosen.tolist(), strict=True))
    if world.is_main:
        told = ", ".join(f"{size} at {bandwidth}" for bandwidth, size in sizes.items())
        print(
            f"mae-et: micro-batches that fit: {told} (of {share} images of a process)",
            file=sys.stderr,
        )
    return sizes


def optimizer_bytes(run: Run) -> int:
    """Return the bytes that training takes beside a pass: sums of gradients, AdamW's two moments.

    Between processes gradients live in the buckets that are exchanged, and take no more.
    """
    trained = sum(p.numel() * p.element_size() for p in run.network.parameters() if p.requires_grad)
    return trained * (1 if run.state.optimizer.state else 3)


def largest_part(peak: Callable[[int], int | None], parts: list[int], limit: int) -> int:
    """Return the largest of rising sizes whose peak stays within a limit, in bytes; 0 if none.

    Peaks are taken to grow in a line with the size. The size chosen is tried too: where memory runs
    out all the same, or it takes more than was foreseen, the next smaller one is.

    Args:
        peak: from a size to the bytes that it takes at most, None if memory ran out.
        parts: sizes.
        limit: bytes.
    """
    first = parts[0]
    least = peak(first)
    if least is None or least > limit:
        return 0
    second = next((size for size in parts if size >= 2 * first), first)
    more = peak(second) if second > first else least
    if more is None or more > limit:
        return first
    slope = max(0.0, (more - least) / max(1, second - first))
    fitting = [size for size in parts if least + slope * (size - first) <= limit]
    for size in reversed(fitting):
        if size <= second:
            return size
        taken = peak(size)
        if taken is not None and taken <= limit:
            return size
    return first
