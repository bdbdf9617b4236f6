"""Lines for the person at the terminal, on stderr."""

import contextlib
import sys

from tqdm import tqdm


def say(line: str) -> None:
    """Print a line to stderr, above the progress bar.

    A closed terminal or pipe never ends the run; metrics.jsonl records the same facts.
    """
    with contextlib.suppress(OSError):
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
