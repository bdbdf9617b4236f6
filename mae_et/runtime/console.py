"""Lines for the person at the terminal, on stderr, and child processes that do not hold it."""

import contextlib
import fcntl
import os
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache

from tqdm import tqdm

# tqdm's own lock is shared with forked processes: a loader process that is killed while it writes a
# line would keep it. No line is written during a fork, because the locks of stderr are copied.
_writing = threading.RLock()
tqdm.set_lock(_writing)
os.register_at_fork(
    before=_writing.acquire, after_in_parent=_writing.release, after_in_child=_writing.release
)


def printable(text: str) -> str:
    r"""Escape control characters (`\x1b`), which names of files, classes or keys may contain."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def say(fact: str) -> None:
    """Print a fact to stderr, with the program's name before it; see `write_line`."""
    write_line(f"mae-et: {fact}")


def write_line(line: str) -> None:
    """Print a line to stderr, above the progress bar, with control characters escaped.

    A closed terminal or pipe never ends the run; metrics.jsonl records the same facts.
    """
    with _writing, contextlib.suppress(OSError):
        tqdm.write(printable(line), file=sys.stderr)
        sys.stderr.flush()


def is_main() -> bool:
    """Whether this process is rank 0, also before it has joined and after it has left the group."""
    return os.environ.get("RANK", "0") == "0"


@lru_cache(maxsize=256)
def notify(fact: str) -> None:
    """Print a line to stderr from the main rank, the first time that this process states it."""
    if is_main():
        say(fact)


@contextlib.contextmanager
def null_streams() -> Iterator[None]:
    """Keep processes started in the block from holding a pipe or a connection of this one open."""
    kept = {}
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            kept[stream] = fcntl.fcntl(stream, fcntl.F_DUPFD_CLOEXEC, 3)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in kept:
            os.dup2(null, stream)
        yield
    finally:
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(null)
