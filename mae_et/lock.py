"""One writer for a run folder."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from mae_et.errors import UserError


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Create a folder if need be, and keep other processes from writing a run to it.

    The lock ends with this process, however it ends, and is not inherited by its workers.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"output.folder {folder} cannot be written to: {error.strerror}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is writing a run to output.folder {folder}") from None
        yield
