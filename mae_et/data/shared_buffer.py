"""Memory shared by processes of one machine: written by some, then read in place by all."""

import contextlib
import mmap
import os
import weakref
from collections.abc import Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae_et.errors import UserError

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every GPU of the process."""


class SharedBuffer:
    """Anonymous shared memory (memfd), inherited by loader processes, forked or spawned.

    It leaves no file behind, is freed with the last process that holds it, and does not count
    against the size of /dev/shm, which containers often limit to 64 MB.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._whole: Tensor | None = None
        self._pinned = False

    @classmethod
    def create(cls) -> "SharedBuffer":
        """Create an empty buffer, which grows as it is written to."""
        if not hasattr(os, "memfd_create"):
            raise UserError("data.cache ram needs Linux (memfd_create)")
        return cls(os.memfd_create("mae-et-cache"))

    def address(self) -> list[int]:
        """Return where other processes can find this buffer, once it is complete.

        Returns:
            Process id, descriptor, and the file's inode and size in bytes.
        """
        file = os.fstat(self.descriptor)
        return [os.getpid(), self.descriptor, file.st_ino, file.st_size]

    @classmethod
    def attach(cls, address: Sequence[int]) -> "SharedBuffer":
        """Open a buffer for reading by the `address` that another process of this machine returned.

        In another container the id may be that of an unrelated process, whose files have other
        inodes or sizes.

        Raises:
            OSError: the process is not visible here, is another one, or belongs to another user.
        """
        process, descriptor, *identity = address
        path = Path(f"/proc/{process}/fd/{descriptor}")
        file = path.stat()  # before opening, which could block on a pipe
        if [file.st_ino, file.st_size] != identity:
            raise OSError(f"process {process} is another one in this container")
        return cls(os.open(path, os.O_RDWR))  # pinned pages must be writable

    def write(self, array: np.ndarray, offset: int) -> None:
        """Write an array's bytes; several processes may write to places that do not overlap."""
        left = np.ascontiguousarray(array).data.cast("B")
        while left:
            written = os.pwrite(self.descriptor, left, offset)
            left, offset = left[written:], offset + written

    def whole(self) -> Tensor:
        """Return all bytes, uint8, in place; the buffer may not be written to afterwards."""
        if self._whole is None:
            self._whole = torch.frombuffer(mmap.mmap(self.descriptor, 0), dtype=torch.uint8)
        return self._whole

    def read(self, dtype: Any, shape: Sequence[int], offset: int) -> np.ndarray:
        """Return a read-only view of an array; the buffer may not be written to afterwards."""
        count = int(np.prod(shape))
        array = np.frombuffer(self.whole().numpy(), dtype, count, offset).reshape(shape)
        array.flags.writeable = False
        return array

    def pin(self, device: torch.device) -> str:
        """Pin the memory, for as long as this object exists, so that a GPU reads it by itself.

        Copies of views of `whole` to the GPU are asynchronous then, and take no core's time.

        Returns:
            Why CUDA cannot pin it, in which case copies are slower; empty if it has.
        """
        if self._pinned:
            return ""
        whole, runtime = self.whole(), torch.cuda.cudart()
        error = runtime.cudaHostRegister(whole.data_ptr(), whole.nbytes, PORTABLE)
        if error == runtime.cudaError.success:
            weakref.finalize(self, _unpin, whole, os.getpid())
            self._pinned = True
            return ""
        with contextlib.suppress(RuntimeError):  # the next launch raises the error again, once
            torch.zeros(1, device=device)
        return runtime.cudaGetErrorString(error)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.descriptor),)


def _unpin(whole: Tensor, process: int) -> None:
    if os.getpid() == process:  # not in a forked one
        torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())


def _received(descriptor: Any) -> SharedBuffer:
    return SharedBuffer(descriptor.detach())
