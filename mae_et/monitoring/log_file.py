"""log.txt in the run folder: what the main rank prints to stderr, with the time."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from mae_et.io.plain_files import no_follow
from mae_et.runtime.console import earlier, listeners

LOG = "log.txt"


@contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Append lines to the folder's log within the block, after those printed before it.

    An error that ends the block is the last line. A full disk, or a deleted log, never ends it.
    """
    # Without a buffer, whose rest would raise when the file is closed on a full disk.
    with open(folder / LOG, "ab", buffering=0, opener=no_follow) as file:

        def write(line: str) -> None:
            with suppress(OSError, ValueError):  # ValueError: a forked process after the block
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n".encode())

        write(f"$ {shlex.join(sys.argv)}")
        while earlier:
            write(earlier.popleft())
        listeners.append(write)
        try:
            yield
        except BaseException as error:
            write(f"{type(error).__name__}: {error}")
            raise
        finally:
            listeners.remove(write)
