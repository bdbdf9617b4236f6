"""Lines for the person at the terminal, on stderr."""

import contextlib
import os
import sys

from tqdm import tqdm


def say(line: str) -> None:
    """Print a line to stderr, above the progress bar.

    A closed terminal or pipe never ends the run; metrics.jsonl records the same facts.
    """
    with contextlib.suppress(OSError):
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def is_main() -> bool:
    """Whether this process is rank 0, also before it has joined and after it has left the group."""
    return os.environ.get("RANK", "0") == "0"
