"""Share a rank's cores between loader processes and compute threads.

On a CPU both compete for cores. A thread that waits for a core keeps all others of a parallel
region waiting: on two cores, one thread beside one loader process trains the demo 1.5 times as fast
as two threads.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mae_et.runtime.console import notify
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.placement import own_cores, usable_cores

MAX_WORKERS = 16
CORES_PER_WORKER = 4
"""On a CPU, training on an image takes several times as long as loading it."""
SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that fix the number of threads; torchrun sets the first one."""


def worker_count(requested: int | None, world: DistributedContext | None = None) -> int:
    """Return the number of loader processes of a rank; every rank must call this.

    If none is requested, 1 to 16: the cores of this rank (`own_cores`), or a quarter of them if it
    computes on the CPU. Without `world`, this process only loads.
    """
    if requested is not None:
        return requested
    cores = len(usable_cores()) if world is None else own_cores(world)
    on_cpu = world is not None and world.device.type == "cpu"
    return min(MAX_WORKERS, max(1, cores // CORES_PER_WORKER if on_cpu else cores))


@contextmanager
def compute_threads(
    num_workers: int, world: DistributedContext, quiet: bool = False
) -> Iterator[None]:
    """On a CPU, compute with one thread for each core that loader processes leave free.

    A number set by the user (`SET_BY_USER`) is kept, and so is a smaller one, for example from
    `torch.set_num_threads`. The previous number is restored afterwards.
    Every rank must call this. A line reports the number, unless `quiet`.
    """
    before = torch.get_num_threads()
    cores = own_cores(world)
    threads = max(1, cores - num_workers)
    given = any(name in os.environ for name in SET_BY_USER)
    if world.device.type != "cpu" or given or threads >= before:
        yield
        return
    if not quiet:
        notify(
            f"{threads} of {cores} cores compute{'s' * (threads == 1)}, beside {num_workers} "
            f"loader process{'es' * (num_workers != 1)}; OMP_NUM_THREADS sets the threads"
        )
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
