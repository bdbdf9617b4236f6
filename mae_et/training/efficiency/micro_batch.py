"""Micro-batch sizes: as configured, or the largest that fit in memory.

To fit them, a forward and backward pass on black images runs at two small sizes; the difference of
their peaks gives the memory of an image. Network, gradients and generators are restored afterwards.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from mae_et.curriculum.plan import PlannedStage
from mae_et.errors import RunFailed
from mae_et.runtime import distributed
from mae_et.runtime.console import say
from mae_et.training.efficiency.memory import (
    available_memory,
    peak_of,
    wait_for_other_processes,
    without_trace,
)
from mae_et.training.plan import micro_batch_size
from mae_et.training.run import Run

MARGIN = 0.1
"""Fraction of the memory to leave free, for whatever two sizes do not reveal."""

Attempt = Callable[[PlannedStage, int], None]
"""Forward and backward pass over a number of images at a stage."""


def fit_micro_batch(
    run: Run, saved: dict[str, Any] | None, attempt: Attempt, multiple: int = 1
) -> dict[int, int]:
    """Return a run's micro-batches: those of its checkpoint if they fit, else the largest that do.

    The checkpoint's sizes are lowered, with a line that says so, only if they do not fit. The state
    keeps the sizes for the next start, unless other processes held GPU memory meanwhile. The
    network is neither compiled nor wrapped yet. Sizes are divisible by `multiple`, unless it does
    not divide a rank's share of the batch.
    """
    kept: dict[int, int] | None = (saved or {}).get("micro_batch")
    crowded = distributed.any_rank(wait_for_other_processes(run.world), run.world)
    if crowded and run.world.is_main:
        say("other processes still hold memory: micro-batches that fit now are not kept")
    distributed.connect(run.world)
    if kept and _all_fit(run, kept, attempt):
        sizes = kept
    else:
        sizes = fitted_micro_batch(run, attempt, multiple)
        if kept:
            sizes = {bandwidth: min(kept[bandwidth], size) for bandwidth, size in sizes.items()}
            if sizes != kept and run.world.is_main:
                listed = ", ".join(f"{size} at {b}" for b, size in kept.items())
                say(f"micro-batches of the checkpoint ({listed}) do not fit now: lowered")
    if run.world.is_main:
        listed = ", ".join(f"{size} at {bandwidth}" for bandwidth, size in sizes.items())
        share = run.plan.batch_size // run.world.size
        say(f"micro-batches that fit: {listed} (of {share} images per rank)")
    run.state.micro_batch = kept if crowded else sizes
    return micro_batch_size(sizes, run.plan, run.world.size)


def _all_fit(run: Run, sizes: dict[int, int], attempt: Attempt) -> bool:
    """Return whether micro-batches fit in the memory of every rank.

    They may take up half the margin, so that small differences between starts do not lower them.
    """
    limit = _limit(run, MARGIN / 2)
    with without_trace(run.network):
        first, *_ = sizes.items()
        _peak(run, attempt, *first)  # libraries allocate their workspaces in the first pass
        peaks = [_peak(run, attempt, *each) for each in sizes.items()]
    return not distributed.any_rank(any(p is None or p > limit for p in peaks), run.world)


def fitted_micro_batch(run: Run, attempt: Attempt, multiple: int) -> dict[int, int]:
    """Return the largest micro-batch at each bandwidth, the same on every rank."""
    world, network, share = run.world, run.network, run.plan.batch_size // run.world.size
    parts = [size for size in range(1, share + 1) if share % size == 0 and size % multiple == 0]
    limit = _limit(run)
    sizes = {}
    with without_trace(network):
        for bandwidth in run.plan.bandwidths:
            peak = partial(_peak, run, attempt, bandwidth)
            if parts:
                peak(parts[0])  # libraries allocate their workspaces in the first pass
            sizes[bandwidth] = largest_part(peak, parts, limit) if parts else share
    chosen = torch.tensor(list(sizes.values()))
    if world.size > 1:
        dist.all_reduce(chosen, dist.ReduceOp.MIN)
    if not chosen.all():
        bandwidth = next(b for b, size in zip(sizes, chosen.tolist(), strict=True) if not size)
        raise RunFailed(
            f"efficiency.micro_batch auto: at bandwidth {bandwidth} the smallest micro-batch "
            f"does not fit in memory ({max(limit, 0) / 2**30:.2f} GiB free for a pass); try "
            "efficiency.gradient_checkpointing"
        )
    return dict(zip(sizes, chosen.tolist(), strict=True))


def _limit(run: Run, margin: float = MARGIN) -> int:
    """Return the bytes that a pass may take."""
    return int(available_memory(run.world) * (1 - margin)) - optimizer_bytes(run)


def _peak(run: Run, attempt: Attempt, bandwidth: int, size: int) -> int | None:
    """Return the peak memory of a pass at a bandwidth, in bytes; None if memory ran out."""
    stage = next(each for each in reversed(run.plan.stages) if each.bandwidth == bandwidth)
    return peak_of(partial(attempt, stage, size), run.world.device)


def optimizer_bytes(run: Run) -> int:
    """Return the bytes that training takes besides a pass: gradients and AdamW's two moments.

    DistributedDataParallel, whose buckets hold the gradients, once allocates new buckets beside the
    old ones.
    """
    trained = sum(p.numel() * p.element_size() for p in run.network.parameters() if p.requires_grad)
    copied = int(run.world.size > 1 and run.graphs is None)
    return trained * (copied + (1 if run.state.optimizer.state else 3))


def largest_part(peak: Callable[[int], int | None], parts: list[int], limit: int) -> int:
    """Return the largest size whose peak memory is within a limit; 0 if there is none.

    Peaks, in bytes (None if memory ran out), are extrapolated linearly from two small sizes. The
    chosen size is tried too; if it takes more than the limit, the next smaller one is tried. The
    candidates, `parts`, ascend.
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
    while fitting[-1] > second:
        taken = peak(fitting[-1])
        if taken is not None and taken <= limit:
            break
        fitting.pop()
    return fitting[-1]
