"""Join the ranks of torchrun's current attempt, and none of an earlier attempt.

torchrun keeps one store over its restarts (pytorch/pytorch#135712), in which ranks publish their
addresses. A restarted rank that reads a dead rank's address fails to connect, or waits for it. The
restart count cannot distinguish attempts, because each node counts its own.
"""

import atexit
import os
import sys
import threading
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mae_et.errors import RunFailed, UserError
from mae_et.runtime.console import say

LEADER = "mae_et/leader"
PATIENCE_MARGIN = 300
# A rank that waits longer for its peers reports it, and again after each doubling of the time.
NOTICE_SECONDS = 60.0
# PyTorch's default is 30 minutes; parts of it count milliseconds in 32 bits.
FOREVER = timedelta(days=24)


def check_launch() -> None:
    """Check the variables that a launcher of several ranks sets."""
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "MASTER_ADDR"):
        value = os.environ.get(name, "")
        if not (value if name == "MASTER_ADDR" else value.isdecimal()):
            raise UserError(
                f"the environment variable {name} is {value!r}: start several ranks with torchrun "
                "or mae-et submit, or unset WORLD_SIZE for one"
            )


def join(backend: str, patience: float | None) -> None:
    """Join the process group; report a long wait, and which ranks did not join.

    PyTorch waits in C++, where no Python signal handler runs, so another thread joins.
    """
    rank, size = os.environ.get("RANK", "0"), os.environ["WORLD_SIZE"]
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    timeout = FOREVER if patience is None else timedelta(seconds=patience + PATIENCE_MARGIN)
    errors: list[Exception] = []

    def connect() -> None:
        try:
            dist.init_process_group(backend, timeout=timeout, **meeting_place(timeout))
        except Exception as error:
            errors.append(error)

    joining = threading.Thread(target=connect, name="join", daemon=True)
    joining.start()
    began, notice = time.monotonic(), NOTICE_SECONDS
    while joining.is_alive():
        joining.join(0.05)
        waited = time.monotonic() - began
        if waited > notice:
            say(f"rank {rank} is waiting for {size} ranks at {address}")
            notice *= 2
        if patience is not None and waited > patience:
            errors.append(TimeoutError(f"timed out after {patience:g} s (step_timeout)"))
            atexit.register(_end_beside, joining)
            break
    if errors and not isinstance(errors[0], (dist.DistError, TimeoutError)):
        raise errors[0]
    if errors:
        reason = str(errors[0]).strip().split("\n")[0]
        raise RunFailed(f"rank {rank} could not join {size} ranks at {address}: {reason}")


def _end_beside(joining: threading.Thread) -> None:
    """Exit at once after a failure to join, if the joining thread is still waiting in C++.

    If Python finalised meanwhile, the thread would abort the process as soon as its wait ends.
    """
    if joining.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def meeting_place(timeout: timedelta) -> dict[str, Any]:
    """Return the arguments of `init_process_group` that define the store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}  # PyTorch creates a store that ends with the ranks
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    name = name_attempt(store, rank, size, timeout)
    return {"store": dist.PrefixStore(name, store), "rank": rank, "world_size": size}


def name_attempt(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """Agree on a name that no other attempt has, despite earlier entries in the store.

    Each rank draws a name; rank 0's becomes the attempt's. Rank 0 lists the names that the other
    ranks sent, and a rank that finds its own in the list knows that this rank 0 is alive.
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
