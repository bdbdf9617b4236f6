"""One writer per folder."""

import contextlib
import errno
import fcntl
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mae_et.errors import RunFailed, UserError
from mae_et.io.atomic import MACHINE, process_exists, refuse_unwritable
from mae_et.io.plain_files import no_follow, read_bytes

ENDED = b"ended"


@contextlib.contextmanager
def sole_writer(folder: Path, key: str = "output.dir") -> Iterator[Callable[[], None]]:
    """Create a folder if necessary, and lock it against other processes.

    A POSIX lock: the kernel releases it however this process ends, and forked loader workers do not
    inherit it (with flock they would, and keep it while they outlive their parent). On a file
    system without locks, a warning asks the user to start no second writer. The lock file names
    the machine and the process, for `writer_has_ended`.

    Yields:
        A function that raises RunFailed if the folder, and its lock with it, has been deleted,
        moved or replaced: another run may then lock the path.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written to or locked.
    """
    path = folder / ".lock"
    with refuse_unwritable(f"{key} {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = no_follow(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in {errno.EACCES, errno.EAGAIN}:
                raise UserError(f"another process is writing to {key} {folder}") from None
            if error.errno not in {errno.ENOSYS, errno.EOPNOTSUPP}:
                raise UserError(f"{key} {folder} cannot be locked: {error.strerror}") from None
            warnings.warn(
                f"the file system of {key} {folder} has no locks (Lustre without its option "
                "flock?): start nothing else that writes there",
                stacklevel=2,
            )
        _write(descriptor, f"{MACHINE} {os.getpid()}".encode())
        try:
            yield partial(check_in_place, path, descriptor)
        finally:
            _write(descriptor, ENDED)
    finally:
        os.close(descriptor)


def _write(descriptor: int, content: bytes) -> None:
    """Replace an open file's content, for information only: the disk may be full, or gone."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)


def writer_has_ended(folder: Path, since: float) -> bool | None:
    """Return whether the last `sole_writer` of a folder has ended; None if it is unknown.

    It is known if the writer recorded its end, or ran on this machine. A lock file older than
    `since` (Unix time) is not of a writer started after it.
    """
    path = folder / ".lock"
    try:
        changed, content = path.stat().st_mtime, read_bytes(path)
    except OSError:
        return None
    if changed < since:
        return None
    if content == ENDED:
        return True
    machine, _, process = content.decode(errors="replace").rpartition(" ")
    return not process_exists(process) if machine == MACHINE else None


def check_in_place(path: Path, descriptor: int) -> None:
    """Raise RunFailed if an open file has been deleted, moved, replaced or truncated."""
    status = os.fstat(descriptor)
    try:
        same = os.path.samestat(path.lstat(), status)
    except (FileNotFoundError, NotADirectoryError):
        same = False
    if not same or status.st_size < os.lseek(descriptor, 0, os.SEEK_CUR):
        raise RunFailed(
            f"{path} was deleted, moved, replaced or truncated while this run was writing; the run "
            "ends, and the same command resumes from the checkpoints that are left"
        )


def check_writable(folder: Path) -> None:
    """Create a folder if necessary, and check that files can be created in it.

    It may be a link to another disk; unchecked, the first checkpoint could fail after hours.
    """
    with refuse_unwritable(f"the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
