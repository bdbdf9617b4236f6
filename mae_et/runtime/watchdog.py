"""End a process in which nothing moves any more, and write down where it stood.

A rank whose peer hangs waits in a collective, a process whose disk hangs waits in the kernel: both
for ever, at full price. A thread of its own looks whether the run still makes steps; the numbers
are not touched. What is saved is kept, and the same command goes on from there.
"""

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_STATUS = 75  # EX_TEMPFAIL: try again later
PEERS_SECONDS = 10.0
"""Between the report and the end: peers that wait for this process get to report too, for a
launcher kills them as soon as one has ended."""
LOOKS = 20
"""In the time that is allowed, or one a second: peers then report at about the same time."""


class _Watch:
    def __init__(self, seconds: float):
        self.seconds = seconds
        self.beaten = False
        self.quiet: float | None = None  # until the first beat: opening data may take its time
        self.over = threading.Event()

    def look(self) -> None:
        slice_ = min(1.0, self.seconds / LOOKS)
        before = time.monotonic()
        while not self.over.wait(slice_):
            now = time.monotonic()
            # A job that was suspended for an hour has not hung for an hour.
            passed, before = min(now - before, 2 * slice_), now
            if self.beaten:
                self.beaten, self.quiet = False, 0.0
            elif self.quiet is not None:
                self.quiet += passed
                if self.quiet >= self.seconds:
                    self.end()

    def end(self) -> None:
        rank = os.environ.get("RANK", "0")
        print(
            f"mae-et: process {rank} has finished no step in {self.seconds:g} s "
            "(efficiency.step_timeout) and ends; what was saved is kept, and the same command goes "
            "on from there. Its threads stand at:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(PEERS_SECONDS)
        # Loader processes may hang too. Their end wakes the main thread, so it comes last.
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(EXIT_STATUS)


_watch: _Watch | None = None


@contextmanager
def hang_watchdog(seconds: float | None) -> Iterator[None]:
    """End this process with status 75 if no `heartbeat` comes for `seconds` after the first one.

    Args:
        seconds: how long; None waits for ever.
    """
    global _watch
    if seconds is None:
        yield
        return
    _watch = watch = _Watch(seconds)
    threading.Thread(target=watch.look, name="hang", daemon=True).start()
    try:
        yield
    finally:
        watch.over.set()
        _watch = None


def heartbeat() -> None:
    """Tell the watch, if there is one, that something was done."""
    if _watch is not None:
        _watch.beaten = True
