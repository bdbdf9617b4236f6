"""Errors of the machine become one sentence."""

import errno

import numpy as np
import pytest
import torch

from mae_et.errors import RunFailed
from mae_et.runtime.system_errors import explain_system_errors


def test_impossible_allocations_report_out_of_memory() -> None:
    def in_numpy() -> None:
        np.empty(10**15)

    def in_torch() -> None:
        torch.empty(10**15)

    def beyond_int64() -> None:
        torch.empty(2**40, 2**40)

    for ask in (in_numpy, in_torch, beyond_int64):
        with pytest.raises(RunFailed, match=r"^out of memory: sizes of"), explain_system_errors():
            ask()


def raised(error: Exception) -> str:
    """Return the sentence of the RunFailed that an error becomes."""
    with pytest.raises(RunFailed) as found, explain_system_errors():
        raise error
    return str(found.value)


SHARED_MEMORY_IN_A_WORKER = """Caught RuntimeError in DataLoader worker process 0.
Original Traceback (most recent call last):
RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device
"""
BUS_ERROR = """DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that
dataloader's workers are out of shared memory."""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("unable to write to file </torch_1_2_3>: No space left on device (28)", "shared memory"),
        (SHARED_MEMORY_IN_A_WORKER, "shared memory (/dev/shm) is full: lower efficiency.num_wor"),
        (BUS_ERROR, "shared memory (/dev/shm) is full"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "a loader worker died"),
        ("Pin memory thread exited unexpectedly", "a loader worker died"),
        ("received 0 items of ancdata", "too many open files: lower efficiency.num_workers"),
        ("Too many open files. Communication with the workers is no long", "too many open files"),
        ("can't start new thread", "no more processes or threads can start: lower efficiency."),
        ("unable to mmap 9 bytes from file </torch_1>: Cannot allocate memory", "out of memory"),
        ("CUDA unknown error - this may be due to an incorrect", "the GPU or one of its libraries"),
        ("CUDA driver version is insufficient for CUDA runtime", "the GPU or one of its libraries"),
        ("CUDA-capable device(s) is/are busy or unavailable", "the GPU or one of its libraries"),
        ("Unable to find a valid cuDNN algorithm to run convol", "the GPU or one of its libraries"),
        ("Triton Error [CUDA]: out of memory", "CUDA out of memory"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "a loader worker died"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x", "CUDA out of memory"),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDA out of memory"),
        ("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0", "CUDA out of memory"),
        ("Error while decoding JPEG images: Failed to decode batch: 5", "CUDA out of memory"),
        (
            "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nCuda failure 2 'out of memory'",
            "CUDA out of memory",
        ),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "the GPU or one of its libraries failed"),
        ("CUDA error: an illegal memory access was encountered\nCUDA", "the GPU or one of its"),
        ("NCCL Error 1: unhandled cuda error (run with NCCL_DEBUG=INFO)", "the GPU or one of its"),
        ("CUDA error: uncorrectable ECC error encountered", "the GPU has a hardware fault"),
        ("NCCL error: remote process exited or network error", "the connection to another rank"),
        ("NCCL communicator was aborted on rank 0.", "the connection to another rank"),
        ("[Rank 0] Watchdog caught collective operation timeout: W", "the connection to another"),
        (
            "recvValueWithTimeout failed on SocketImpl: Broken pipe",
            "the connection to another rank",
        ),
        ("ncclInvalidUsage: Duplicate GPU detected : rank 0 and", "two ranks run on the same GPU"),
        ("[device.cc:39] Unable to find address for: ib9", "this node has no network interface"),
        ("[gloo/tcp/pair.cc] Connection closed by peer [::1]:42", "the connection to another rank"),
    ],
)
def test_errors_of_pytorch_are_named_as_what_they_are(text: str, sentence: str) -> None:
    assert raised(RuntimeError(text)).startswith(sentence)


def test_error_inside_a_loader_worker_is_not_reported_as_its_death() -> None:
    """The worker reports its own traceback, which says more than any sentence about memory."""
    text = "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: size mismatch"
    with pytest.raises(RuntimeError, match="size mismatch") as found, explain_system_errors():
        raise RuntimeError(text)
    assert not isinstance(found.value, RunFailed)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "too many open files"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no more processes"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (
            MemoryError("Caught MemoryError in DataLoader worker\nOriginal\nMemoryError: 9 GB"),
            "out of",
        ),
    ],
)
def test_limits_of_the_system_are_named(error: Exception, sentence: str) -> None:
    said = raised(error)
    assert said.startswith(sentence)
    assert "Original" not in said
