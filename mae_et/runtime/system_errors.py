"""Failures of the machine, told in a sentence."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mae_et.errors import Interrupted, PeerLost, RunFailed

# How gloo and NCCL report a process that is gone. NCCL's "unhandled cuda error" is this process's.
_PEER_LOST = re.compile(
    r"gloo.*(Connection|Read error|Write error|Timed out)"
    r"|NCCL.*(remote|timeout|unhandled system error)",
    re.I,
)

# How torch reports it on a CPU; sizes beyond all count as too large for any memory.
_NO_MEMORY = re.compile(r"can't allocate memory|Storage size calculation overflowed")

_NOT_WRITTEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


@contextmanager
def explain_system_errors() -> Iterator[None]:
    """Turn exhausted memory, full disks and dead processes into a sentence that says what to do.

    Raises:
        RunFailed: memory or the disk ran out, or a loader process died.
        PeerLost: another training process is gone.
    """
    try:
        yield
    except (RunFailed, Interrupted):
        raise
    except MemoryError as error:
        raise RunFailed(_out_of_memory(error)) from None
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        what = error.filename or "the run's files"
        raise RunFailed(
            f"cannot write {what}: {error.strerror}; what was saved is kept, and the same "
            "command goes on from there"
        ) from error
    except RuntimeError as error:
        if _is_out_of_gpu_memory(error):
            raise RunFailed(
                "CUDA out of memory: --efficiency.micro_batch auto finds what fits; or lower it "
                "(batch_size where features are computed)"
            ) from None
        if _PEER_LOST.search(" ".join(str(error).split())):
            raise PeerLost(
                "the connection to another process broke: it died, or its machine did (its log may "
                f"say why); what was saved is kept; torch says: {str(error).splitlines()[0]}"
            ) from error
        if _NO_MEMORY.search(str(error)):
            raise RunFailed(_out_of_memory(error)) from None
        if "DataLoader worker" not in str(error):
            raise
        raise RunFailed(
            "a loader process died, as it does when memory or /dev/shm runs out: lower "
            "efficiency.num_workers (workers) or efficiency.micro_batch (batch_size)"
        ) from error


def _is_out_of_gpu_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # commands that never import it cannot raise its errors
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _out_of_memory(error: Exception) -> str:
    said = " ".join(str(error).split()) or "nothing more is said of it"
    return f"out of memory: sizes of the model, the images or a batch are too large: {said}"
