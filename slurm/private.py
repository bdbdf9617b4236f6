"""Keep what a job runs, its pickle and its code, unwritable to others."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mae_et.errors import UserError

# Write permissions that pickles, code and the port do not give to others.
PRIVATE = 0o022


def current_umask() -> int:
    """Return the umask of this process."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def make_private(folder: Path) -> None:
    """Create a folder in a run folder that only this user can write to or replace, or refuse it.

    Jobs load a pickle and import code from it: anyone who can write to the folder, or replace it in
    the run folder, can run code as this user. A group keeps its write permission on the run folder,
    where the sticky bit lets it add files, but not rename or delete those of others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise UserError(f"{folder} is a link; delete it")
    for place in (folder.parent, folder):
        facts = place.stat()
        if facts.st_uid != os.getuid():
            raise UserError(f"{place} belongs to another user, who could change the job in it")
        mode = stat.S_IMODE(facts.st_mode)
        if mode & PRIVATE:
            shared = place != folder and mode & stat.S_IWGRP
            place.chmod(mode & ~stat.S_IWOTH | stat.S_ISVTX if shared else mode & ~PRIVATE)


@contextmanager
def private_files(folder: Path) -> Iterator[None]:
    """Create a private folder, and files in it that only this user can write to in the block."""
    make_private(folder)
    kept = current_umask()
    os.umask(kept | PRIVATE)
    try:
        yield
    finally:
        os.umask(kept)
