"""One writer for a run folder."""

import contextlib
import errno
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mae_et.errors import UserError


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Create a folder if need be, and keep other processes from writing a run to it.

    The lock ends with this process, however it ends, and is not inherited by its workers.

    Raises:
        UserError: another process holds it, or the folder cannot be written to or locked.
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
            else:  # a file system that knows no locks
                sentence = f"output.dir {folder} cannot be locked: {error.strerror}"
            raise UserError(sentence) from None
        yield


def check_writable(folder: Path) -> None:
    """Create a folder if need be, and refuse one in which no file can be made.

    It may be a link to another disk; without a look, hours of training would go by before the first
    checkpoint fails.

    Raises:
        UserError: it is read-only, somebody else's, or no folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise UserError(f"the folder {folder} cannot be written to: {error.strerror}") from None
