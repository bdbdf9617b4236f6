"""Placement of a node's ranks: one GPU each, and their CPU cores."""

import os
import platform
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path

import torch

from mae_et.errors import UserError
from mae_et.runtime.agreement import all_gather_json
from mae_et.runtime.distributed import DistributedContext


def check_own_gpus(world: DistributedContext) -> None:
    """Check over all ranks that no two of them use the same GPU, by its UUID.

    Launchers number GPUs in different ways (CUDA_VISIBLE_DEVICES for each rank, or all GPUs for
    all ranks), and a wrong combination puts every rank on one GPU. NCCL would report a duplicate
    GPU only at the first exchange, and less clearly.
    """
    if world.size == 1 or world.device.type != "cuda":
        return
    mine = str(torch.cuda.get_device_properties(world.device).uuid)
    uuids = all_gather_json(mine, world)
    for uuid in uuids:
        sharing = [str(rank) for rank, other in enumerate(uuids) if other == uuid]
        if len(sharing) > 1:
            raise UserError(
                f"ranks {' and '.join(sharing)} run on the same GPU (UUID {uuid}): start one rank "
                "per GPU, and give each rank either all GPUs of its node or its own in "
                "CUDA_VISIBLE_DEVICES"
            )


def usable_cores() -> set[int]:
    """Return the numbers of the CPU cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return set(affinity(0) if affinity else range(os.cpu_count() or 1))


def own_cores(world: DistributedContext) -> int:
    """Return this rank's share of the CPU cores: a core is divided among the ranks that may use it.

    Ranks bound to separate cores (srun --cpus-per-task) keep all of theirs; unbound ranks
    (torchrun) divide the machine. At least 1. Every rank must call this.
    """
    node, mine = node_id(), usable_cores()
    ranks = all_gather_json([node, *mine], world)
    shared = Counter(chain.from_iterable(cores for other, *cores in ranks if other == node))
    return max(1, int(sum(1 / shared[core] for core in mine) + 1e-6))


def node_id() -> int:
    """Return a number that is the same for all ranks of a machine, also in containers."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:  # not Linux
        name = platform.node()
    return zlib.crc32(name.encode())
