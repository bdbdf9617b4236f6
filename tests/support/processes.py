"""Wait for processes that kill themselves."""

import time
from multiprocessing.process import BaseProcess


def exit_code(process: BaseProcess, seconds: float = 60) -> int | None:
    """Wait for a process to end; return its exit code, or None if it still runs.

    `process.join(seconds)` also waits for the loader workers of a killed process, which look for
    their parent every five seconds only.
    """
    end = time.monotonic() + seconds
    while process.exitcode is None and time.monotonic() < end:
        time.sleep(0.01)
    return process.exitcode
