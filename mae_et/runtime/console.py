"""Lines for the person at the terminal, on stderr."""

import contextlib
import os
import sys
from functools import lru_cache

from tqdm import tqdm


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
    with contextlib.suppress(OSError):
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
