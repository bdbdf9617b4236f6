"""Errors of the machine, reported in one sentence each."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mae_et.errors import Interrupted, PeerLost, RunFailed, one_line

# Messages of gloo, NCCL and the store about a lost rank. NCCL's "unhandled cuda error" is this
# rank's own; NCCL aborts a communicator whose peers are gone or do not answer.
_PEER_LOST = re.compile(
    r"gloo.*(Connection|Read error|Write error|Timed out)"
    r"|NCCL.*(remote|timeout|unhandled system error|communicator was aborted)"
    r"|Watchdog caught collective operation timeout"
    r"|(recvValue|sendBytes).* failed|Failed to recv, got 0 bytes|Did the remote server shutdown",
    re.I,
)
_DUPLICATE_GPU = re.compile(r"Duplicate GPU detected", re.I)
_NO_INTERFACE = re.compile(
    r"Unable to find (address|interface) for|no socket interface found", re.I
)
# PyTorch's messages about exhausted memory on a CPU; absurd sizes overflow before allocation.
_NO_MEMORY = re.compile(r"(can't|Cannot) allocate memory|Storage size calculation overflowed")
# GPU libraries do not raise OutOfMemoryError, nor do extensions that call torch's allocator through
# its stable ABI (TorchCodec). nvJPEG's status 5 is a failed allocation.
_NO_GPU_MEMORY = re.compile(
    r"(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|(CUDA error|Triton Error \[CUDA\]): out of memory"
    r"|Cuda failure (\d+ )?'out of memory'|CUDA out of memory\."
    r"|(Failed to (decode|initialize) batch( decoding)?|nvjpegDecode failed): 5\b"
)
_GPU_MEMORY_FAULT = re.compile(r"\bECC\b|uncorrectable|HARDWARE_ERROR|hardware error", re.I)
_GPU_ERROR = re.compile(
    r"CUDA (unknown )?error|CUBLAS_STATUS|CUDNN_STATUS|cuDNN (error|algorithm)|NCCL|cufft|cusolver"
    r"|CUDA driver|CUDA-capable device|NVIDIA driver|Triton Error",
    re.I,
)
# Loader workers pass batches through shared memory; a full /dev/shm fails in either of these ways.
_NO_SHARED_MEMORY = re.compile(
    r"unable to (write to|allocate|resize|open) (file|shared memory).*No space left"
    r"|torch_\d+_\d+.*No space left|out of shared memory|Bus error",
    re.S,
)
# A dead worker; "Caught X in DataLoader worker process" is an error that a live one reports.
_WORKER_DIED = re.compile(r"DataLoader worker \(pid|Pin memory thread exited")
NO_SHARED_MEMORY = (
    "shared memory (/dev/shm) is full: lower efficiency.num_workers or efficiency.micro_batch "
    "(batch_size for features), or enlarge /dev/shm (docker run --shm-size)"
)
WORKER_DIED = (
    "a loader worker died, as happens when memory runs out: lower efficiency.num_workers or "
    "efficiency.micro_batch (batch_size for features)"
)
_TOO_MANY = "lower efficiency.num_workers (num_workers for features), or raise the limit"
# Messages of PyTorch and the system about limits on a user's files and processes.
_LIMITS = {
    re.compile(r"Too many open files|received 0 items of ancdata"): (
        f"too many open files: {_TOO_MANY} (ulimit -n)"
    ),
    re.compile(r"can't start new thread|Resource temporarily unavailable"): (
        f"no more processes or threads can start: {_TOO_MANY} (ulimit -u, pids of the job's cgroup)"
    ),
}

_NOT_WRITTEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})

_RESUMES = "what was saved is kept, and the same command resumes from there"


@contextmanager
def explain_system_errors(writes: bool = False) -> Iterator[None]:
    """Turn exhausted memory, full disks, GPU errors and lost processes into one sentence.

    Args:
        writes: whether the block only writes files, so that any error of a file is one of writing.
    """
    try:
        yield
    except (RunFailed, Interrupted):
        raise
    except MemoryError as error:
        raise RunFailed(_out_of_memory(error)) from None
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise RunFailed(_out_of_memory(error)) from error
        if (limit := _limit_of(error)) is not None:
            raise RunFailed(limit) from error
        if not writes and error.errno not in _NOT_WRITTEN:
            raise
        what = error.filename or "a file"
        raise RunFailed(f"cannot write {what}: {error.strerror}; {_RESUMES}") from error
    except RuntimeError as error:
        sentence = _explain_runtime_error(error)
        if sentence is None:
            raise
        kind = PeerLost if _PEER_LOST.search(one_line(error)) else RunFailed
        raise kind(sentence) from error


def _explain_runtime_error(error: RuntimeError) -> str | None:
    """Return the sentence for an error of PyTorch; None if the machine did not cause it."""
    text, first = one_line(error), str(error).strip().split("\n")[0]
    if is_out_of_gpu_memory(error):
        return (
            "CUDA out of memory: --efficiency.micro_batch auto finds a size that fits; or lower it "
            "(batch_size for features)"
        )
    if _NO_SHARED_MEMORY.search(text):
        return NO_SHARED_MEMORY
    if _NO_INTERFACE.search(text):
        return (
            "this node has no network interface of the given name: see network_interface of the "
            "cluster config, or GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in the environment; "
            f"PyTorch reports: {first}"
        )
    if _DUPLICATE_GPU.search(text):
        return f"two ranks run on the same GPU: start one rank per GPU; NCCL reports: {first}"
    if _PEER_LOST.search(text):
        return (
            "the connection to another rank broke: it died, or its node did (its log may say why); "
            f"{_RESUMES}; PyTorch reports: {first}"
        )
    if _GPU_ERROR.search(text):
        if _GPU_MEMORY_FAULT.search(text):
            cause = "the GPU has a hardware fault; exclude this node"
        else:
            cause = "the GPU or one of its libraries failed"
        return f"{cause}; {_RESUMES}; PyTorch reports: {first}"
    if _NO_MEMORY.search(text):
        return _out_of_memory(error)
    if (limit := _limit_of(error)) is not None:
        return limit
    return WORKER_DIED if _WORKER_DIED.search(text) else None


def is_out_of_gpu_memory(error: Exception) -> bool:
    """Return whether an error means that a GPU's memory ran out, in torch or in a library."""
    torch = sys.modules.get("torch")  # commands that never import it cannot raise its errors
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return _NO_GPU_MEMORY.search(one_line(error)) is not None


def _limit_of(error: Exception) -> str | None:
    """Return the sentence for a system limit that was reached; None for other errors."""
    text = one_line(error)
    return next((said for words, said in _LIMITS.items() if words.search(text)), None)


def _out_of_memory(error: Exception) -> str:
    said = one_line(error) or "no details given"
    if said.startswith("Caught "):  # in a loader worker, whose traceback follows
        said = str(error).strip().split("\n")[-1]
    return f"out of memory: sizes of the model, the images or a batch are too large: {said}"
