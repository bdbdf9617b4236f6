"""Micro-batches that fit: the largest equal part of a process's share that its memory holds.

A forward and backward pass on zeros is run at two small sizes; an image takes the difference
of their peaks. Nothing of it is left in the network, its gradients or the generators.
"""

import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mae_et.curriculum.schedule import PlannedStage
from mae_et.data.sampler import micro_batch_size
from mae_et.errors import RunFailed
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.run import Run

MARGIN = 0.1
"""Share of the memory that is left free, for what two sizes do not tell."""

Attempt = Callable[[PlannedStage, int], None]
"""Runs forward and backward on so many images at a stage."""


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


def available_memory(world: DistributedContext) -> int:
    """Return the bytes that this process may still take.

    On a GPU, what is free and what torch holds without using it. On a CPU, the kernel's estimate
    (MemAvailable of /proc/meminfo) within the limits of its control groups, divided among the
    processes of this machine.

    Raises:
        RunFailed: the system does not say (no /proc).
    """
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        held = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        return free + held
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        raise RunFailed("efficiency.micro_batch auto needs /proc/meminfo; give a number") from None
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return min(kibibytes * 1024, _left_in_control_groups()) // here


def _left_in_control_groups(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes left under the limits of this process's control groups (v2, or v1)."""
    left = 2**63
    try:
        named = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return left
    for line in named:
        _, controllers, name = line.split(":", 2)
        folder = root / ("memory" if controllers else "") / name.strip("/")
        if controllers and "memory" not in controllers.split(","):
            continue
        for group in (folder, *folder.parents):
            for most, used in (
                ("memory.max", "memory.current"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            ):
                limit, taken = _number(group / most), _number(group / used)
                if limit is not None and taken is not None:
                    left = min(left, max(0, limit - taken + _reclaimable(group / "memory.stat")))
            if group == root:
                break
    return left


def _number(file: Path) -> int | None:
    """Return the number in a file; None where there is no file, or it says "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _reclaimable(file: Path) -> int:
    """Return the bytes of files that a control group counts and the kernel gives up at need."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def peak_of(work: Callable[[], None], device: torch.device) -> int | None:
    """Return the most bytes that tensors made in `work` take at once; None if memory ran out."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            work()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        except torch.OutOfMemoryError:
            return None
        finally:
            torch.cuda.reset_peak_memory_stats(device)
    with _Allocations() as allocations:
        work()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, as long as these live.

    On a CPU, unlike the process's size, it depends neither on what the allocator keeps nor on what
    else runs: equal passes, equal counts. An operator's own scratch memory is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        known = {self._key(leaf) for leaf in tree_leaves((arguments, keywords))}
        result = operator(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            key = self._key(leaf)
            if key is None or key in known or key in self.held:
                continue
            storage = leaf.untyped_storage()
            self.held[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.now)
        return result

    @staticmethod
    def _key(leaf: Any) -> int | None:
        return leaf.untyped_storage()._cdata if isinstance(leaf, torch.Tensor) else None

    def _free(self, key: int) -> None:
        self.now -= self.held.pop(key)


@contextmanager
def without_trace(network: nn.Module) -> Iterator[None]:
    """Put gradients, buffers, mode and generators back as they were."""
    training = network.training
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    device = next(network.parameters()).device
    # Of this process's GPU alone: by default it is those of every GPU of the machine.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            network.train()
            yield
        finally:
            network.train(training)
            for parameter in network.parameters():
                parameter.grad = None
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
