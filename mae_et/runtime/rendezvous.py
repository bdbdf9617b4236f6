"""Connect the ranks of torchrun's current attempt, and none of an earlier attempt.

torchrun keeps one store over its restarts (pytorch/pytorch#135712), in which ranks publish their
addresses. A restarted rank that reads a dead rank's address fails to connect, or waits for it. The
restart count cannot distinguish attempts, because each node counts its own.
"""

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mae_et.errors import UserError

LEADER = "mae_et/leader"


def check_launch() -> None:
    """Check the variables that a launcher of several ranks sets.

    Raises:
        UserError: one is missing, or is not a number.
    """
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "MASTER_ADDR"):
        value = os.environ.get(name, "")
        if not (value if name == "MASTER_ADDR" else value.isdecimal()):
            raise UserError(
                f"the environment variable {name} is {value!r}: start several ranks with torchrun "
                "or mae-et submit, or unset WORLD_SIZE for one"
            )


def meeting_place(timeout: timedelta) -> dict[str, Any]:
    """Return the arguments of `init_process_group` that define the store.

    Raises:
        DistError, TimeoutError: a rank did not arrive in time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}  # PyTorch creates a store that ends with the ranks
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    name = name_attempt(store, rank, size, timeout)
    return {"store": dist.PrefixStore(name, store), "rank": rank, "world_size": size}


def name_attempt(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """Agree on a name that no other attempt has, despite earlier entries in the store.

    Each rank draws a name; rank 0's becomes the attempt's. Rank 0 lists the names that the other
    ranks sent, and a rank that finds its own in the list knows that this rank 0 is alive.

    Raises:
        DistError, TimeoutError: a rank did not arrive in time.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set(LEADER, own)
        others = [store.get(f"mae_et/{own}/{other}").decode() for other in range(1, size)]
        store.set(f"mae_et/{own}/ranks", " ".join(others))
        return own
    while time.monotonic() < deadline:
        leader = store.get(LEADER).decode()
        store.set(f"mae_et/{leader}/{rank}", own)
        listed = f"mae_et/{leader}/ranks"
        if store.check([listed]) and own in store.get(listed).decode().split():
            return leader
        time.sleep(0.02)
    raise TimeoutError(f"rank 0 did not list rank {rank}")
