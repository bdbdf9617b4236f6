"""Write files atomically, and report paths that cannot be written to."""

import errno
import glob
import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mae_et.errors import UserError


def _machine() -> str:
    """Return the machine's name and, on Linux, the namespace of this process's id.

    Containers with process ids of their own may share the machine's name.
    """
    with suppress(OSError):
        return f"{platform.node()} {Path('/proc/self/ns/pid').readlink()}"
    return platform.node()


MACHINE = _machine()
# Distinguishes processes with the same id on machines that share a file system.
_MACHINE = hashlib.blake2b(MACHINE.encode(), digest_size=4).hexdigest()


@contextmanager
def refuse_unwritable(name: str) -> Iterator[None]:
    """Raise a UserError if writing in the block fails for any reason but a full disk or quota.

    `name` is the path after the key that gives it, such as `output PATH`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise UserError(f"{name} cannot be written to: {error.strerror}") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, flush the file, and rename it to its place.

    Temporary files that killed processes of this machine left for the same path are deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent == Path("/dev") or not (path.is_file() or path.is_dir() or not path.exists()):
        raise OSError(errno.EINVAL, "it is a device or a pipe", str(path))  # not to be replaced
    start = f".{path.name[:50]}"  # a name of the longest kind leaves no room for more
    temporary = path.with_name(f"{start}.{os.getpid()}.{_MACHINE}.tmp")
    for leftover in path.parent.glob(f"{glob.escape(start)}.[0-9]*.{_MACHINE}.tmp"):
        if not process_exists(leftover.name.split(".")[-3]):
            leftover.unlink(missing_ok=True)
    try:
        # Created anew: in a folder that others can write to, the name could be a link to any file.
        temporary.unlink(missing_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename in {None, str(temporary)}:
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # it is gone, or the folder is read-only: the error above has more
            temporary.unlink()
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Flush a folder, so that new names in it survive a system crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:  # SMB, FUSE
            raise
    finally:
        os.close(descriptor)


def process_exists(process: str) -> bool:
    """Return whether `MACHINE` has a process of this id; True if it is not a number."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except (PermissionError, ValueError):  # another user's process; not our name
        pass
    return True


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed writers; the folder must have no active writer."""
    for leftover in folder.glob(".*.[0-9]*.tmp"):
        leftover.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
