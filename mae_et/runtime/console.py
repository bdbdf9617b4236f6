"""Print lines to stderr, and keep child processes from holding the terminal open."""

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache

from tqdm import tqdm

# tqdm's own lock is shared with forked processes: a loader process killed while writing would never
# release it. No line is written during a fork, because a child copies the locks of stderr.
_writing = threading.RLock()
tqdm.set_lock(_writing)
os.register_at_fork(
    before=_writing.acquire, after_in_parent=_writing.release, after_in_child=_writing.release
)


listeners: list[Callable[[str], None]] = []
"""Are given each line of `write_line`; see `mae_et.monitoring.log_file`."""
earlier: deque[str] = deque(maxlen=100)
"""The last lines, for a log file that opens after them."""


def printable(text: str) -> str:
    r"""Escape control characters (`\x1b`), which file, class or key names may contain."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def say(fact: str) -> None:
    """Print a line to stderr, prefixed by the program's name; see `write_line`."""
    write_line(f"mae-et: {fact}")


def write_line(line: str) -> None:
    """Print a line to stderr, above the progress bar, with control characters escaped.

    A closed terminal or pipe never ends the run; metrics.jsonl records the same facts.
    """
    line = printable(line)
    with _writing:
        for listener in listeners or [earlier.append]:
            listener(line)
        with contextlib.suppress(OSError):
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()


def is_main() -> bool:
    """Whether this process is rank 0, also before it joins and after it leaves the group."""
    return os.environ.get("RANK", "0") == "0"


@lru_cache(maxsize=256)
def notify(fact: str) -> None:
    """Print a line to stderr from the main rank, once per process."""
    if is_main():
        say(fact)


@contextlib.contextmanager
def null_streams() -> Iterator[None]:
    """Keep processes started in the block from holding this process's pipes or connection open."""
    kept = {stream: os.dup(stream) for stream in (1, 2)}
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
