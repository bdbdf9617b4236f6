"""Memory shared by processes of one machine: written by some, then read in place by all."""

import mmap
import os
import weakref
from collections.abc import Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np

from mae_et.errors import UserError


class SharedBuffer:
    """Anonymous shared memory (memfd), inherited by loader processes, forked or spawned.

    It leaves no file behind, is freed with the last process that holds it, and does not count
    against the size of /dev/shm, which containers often limit to 64 MB.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._map: mmap.mmap | None = None

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
        return cls(os.open(path, os.O_RDONLY))

    def write(self, array: np.ndarray, offset: int) -> None:
        """Write an array's bytes; several processes may write to places that do not overlap."""
        left = np.ascontiguousarray(array).data.cast("B")
        while left:
            written = os.pwrite(self.descriptor, left, offset)
            left, offset = left[written:], offset + written

    def read(self, dtype: Any, shape: Sequence[int], offset: int) -> np.ndarray:
        """Return a read-only view of an array; the buffer may not be written to afterwards."""
        if self._map is None:
            self._map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)
        count = int(np.prod(shape))
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.descriptor),)


def _received(descriptor: Any) -> SharedBuffer:
    return SharedBuffer(descriptor.detach())
