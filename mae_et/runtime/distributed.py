"""Distributed training: start, stop and collectives; one rank without a launcher."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mae_et.errors import UserError
from mae_et.runtime.flight_recorder import record_collectives
from mae_et.runtime.rendezvous import check_launch, join
from mae_et.runtime.watchdog import heartbeat


@dataclass(frozen=True)
class DistributedContext:
    """Rank and device of this process, and the number of ranks."""

    rank: int
    size: int
    device: torch.device
    joined: bool = False
    """Whether this command joined the process group; a caller's own group is never destroyed."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0


def choose_device(device: Literal["auto", "cpu", "cuda"] = "auto") -> torch.device:
    """Return this process's device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("efficiency.device is cuda, but torch sees no CUDA device")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return torch.device("cuda", 0)  # a launcher may expose only its own GPU to each rank
    if local >= count:
        raise UserError(
            f"this node has {count} GPU{'s' if count > 1 else ''}, too few for local rank {local}"
        )
    return torch.device("cuda", local)


def initialize(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    patience: float | None = None,
    traces: Path | None = None,
) -> DistributedContext:
    """Join the ranks started by torchrun, or by any launcher that sets RANK and WORLD_SIZE.

    Args:
        device: see `choose_device`.
        patience: seconds to wait for the other ranks to join, and the timeout of collectives plus
            a margin in which the watchdog reports first; None waits forever.
        traces: folder to which ranks on GPUs that hang dump their last collectives.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return DistributedContext(0, 1, chosen)
    check_launch()
    joins = not dist.is_initialized()
    if joins:
        # Flags are reduced on the CPU, so that no rank waits for its GPU.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        if chosen.type == "cuda" and traces is not None:
            record_collectives(traces)
        join(backend, patience)
    return DistributedContext(dist.get_rank(), dist.get_world_size(), chosen, joins)


def shutdown(world: DistributedContext) -> None:
    """Destroy the process group; call it only when all ranks do, because NCCL waits for each.

    After an error on one rank its peers may be in a collective: leaving would block until their
    timeout, before the error is reported. Exiting the process closes its connections.
    """
    if not world.joined:
        return
    if torch.__version__ < "2.8":
        # The call below holds the GIL while joining gloo's threads, which may need the GIL to free
        # tensors of the last collective (pytorch/pytorch#154976, fixed in 2.8): let them finish.
        time.sleep(0.5)
    dist.destroy_process_group()


def connect(world: DistributedContext) -> None:
    """Open NCCL's connections, so that memory measured afterwards counts its buffers.

    NCCL connects at the first exchange, differently for small and for large tensors.
    """
    if world.size > 1 and world.device.type == "cuda":
        for numbers in (1, 2**24):
            dist.all_reduce(torch.zeros(numbers, device=world.device))
        torch.cuda.synchronize(world.device)


def all_reduce_sum(values: Tensor, world: DistributedContext) -> Tensor:
    """Sum a tensor over all ranks, on its device and without waiting for a GPU."""
    if world.size == 1:
        return values
    summed = values.clone()
    dist.all_reduce(summed)
    return summed


def all_gather(values: Tensor, world: DistributedContext) -> Tensor:
    """Gather a tensor from every rank, [R ...], in the order of ranks."""
    if world.size == 1:
        return values[None]
    each = [torch.empty_like(values) for _ in range(world.size)]
    dist.all_gather(each, values)
    return torch.stack(each)


def all_gather_rows(rows: Tensor, world: DistributedContext) -> Tensor:
    """Gather rows [N ...] on the CPU from all ranks; N may differ between ranks."""
    if world.size == 1:
        return rows
    counts = all_gather(torch.tensor(len(rows)), world).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    each = all_gather(padded, world)
    return torch.cat([part[:count] for part, count in zip(each, counts, strict=True)])


def broadcast_buffers(module: nn.Module, world: DistributedContext) -> None:
    """Copy rank 0's buffers (running statistics) to all ranks."""
    if world.size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def any_rank(flag: bool, world: DistributedContext) -> bool:
    """Return whether the flag is set on any rank; a collective that every rank must call."""
    return any_rank_async(lambda: flag, world)()


def any_rank_async(flag: Callable[[], bool], world: DistributedContext) -> Callable[[], bool]:
    """Start `any_rank`, and return a function that waits for its result.

    Work in between hides the exchange, which takes milliseconds with many ranks. The flag is read
    at the start; a single rank, which exchanges nothing, reads it at the end.
    """
    if world.size == 1:
        return flag
    raised = torch.tensor(float(flag()))
    exchange = dist.all_reduce(raised, dist.ReduceOp.MAX, async_op=True)

    def result() -> bool:
        exchange.wait()
        return bool(raised.item())

    return result


def all_ranks_equal(value: int, world: DistributedContext) -> bool:
    """Return whether all ranks have the same integer; a collective that every rank must call."""
    if world.size == 1:
        return True
    extremes = torch.tensor([value, -value])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return bool(extremes[0] == -extremes[1])


def wait_for_main(
    future: Future[None] | None, world: DistributedContext, poll: float = 1.0
) -> None:
    """Wait on all ranks for a future of the main rank, which raises its error.

    Waiting does not trigger their watchdogs; the main rank's still checks for progress.
    """
    while any_rank(future is not None and not wait([future], poll).done, world):
        if not world.is_main:
            heartbeat()
    if future is not None:
        future.result()


def barrier(world: DistributedContext) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()
