"""One writer per run folder."""

import contextlib
import errno
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mae_et.errors import UserError


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Create a folder if necessary, and lock it against other runs.

    A POSIX lock: the kernel releases it when this process ends, however it ends, and forked loader
    workers do not inherit it (they would with flock, and keep it while they outlive their parent).

    Raises:
        UserError: another process holds the lock, or the folder cannot be written to or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"output.dir {folder} cannot be written to: {error.strerror}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in {errno.EACCES, errno.EAGAIN}:
                sentence = f"another process is writing a run to output.dir {folder}"
            else:  # a file system without locks
                sentence = f"output.dir {folder} cannot be locked: {error.strerror}"
            raise UserError(sentence) from None
        yield


def check_writable(folder: Path) -> None:
    """Create a folder if necessary, and refuse one in which no file can be created.

    It may be a link to another disk; unchecked, the first checkpoint would fail after hours.

    Raises:
        UserError: it is read-only, another user's, or not a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise UserError(f"the folder {folder} cannot be written to: {error.strerror}") from None
