"""Exit a process that makes no progress, and print its stack traces.

A rank whose peer hangs waits in a collective, and a process whose disk hangs waits in the kernel,
forever and on reserved hardware. A thread checks that the command still finishes steps or batches.
Results do not change; saved files stay, and the same command resumes from them.
"""

import atexit
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

EXIT_STATUS = 75  # EX_TEMPFAIL: try again later
PEERS_SECONDS = 10.0
"""Delay between the report and the exit, so that waiting peers report too: a launcher kills them as
soon as one rank has exited."""
EXIT_SECONDS = 60
LOOKS = 20
"""Checks per timeout, at least one per second, so that peers report at about the same time."""


class _Watch:
    def __init__(self, seconds: float):
        self.seconds = seconds
        self.beaten = False
        self.quiet: float | None = None  # None until the first heartbeat: opening data may be slow
        self.over = threading.Event()
        self.save: Callable[[], None] | None = None

    def look(self) -> None:
        slice_ = min(1.0, self.seconds / LOOKS)
        before = time.monotonic()
        while not self.over.wait(slice_):
            now = time.monotonic()
            # Time in which the job was suspended does not count.
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
            f"mae-et: rank {rank} finished no step or batch in {self.seconds:g} s (step_timeout) "
            "and exits; saved files stay, and the same command resumes from them. Stacks of its "
            "threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        if self.save is not None:
            signal.alarm(EXIT_SECONDS)  # kills this process if saving hangs too
            with suppress(Exception):
                self.save()
        time.sleep(PEERS_SECONDS)
        # Loader workers may hang too. Their end wakes the main thread, so they are killed last.
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(EXIT_STATUS)


_watch: _Watch | None = None


@contextmanager
def hang_watchdog(seconds: float | None) -> Iterator[None]:
    """Exit with status 75 if no `heartbeat` arrives within `seconds` of the previous one.

    Does nothing without a timeout, or inside another watchdog, whose timeout applies.
    """
    global _watch
    if seconds is None or _watch is not None:
        yield
        return
    _watch = watch = _Watch(seconds)
    threading.Thread(target=watch.look, name="hang", daemon=True).start()
    try:
        yield
    finally:
        watch.over.set()
        _watch = None


def on_hang(save: Callable[[], None]) -> None:
    """Have the watchdog, if there is one, save evidence before it exits."""
    if _watch is not None:
        _watch.save = save


def heartbeat() -> None:
    """Report progress to the watchdog, if there is one."""
    if _watch is not None:
        _watch.beaten = True


def limit_exit() -> None:
    """Kill this process if its exit takes longer than `EXIT_SECONDS`; call it after an error.

    At exit PyTorch aborts NCCL, which may wait for the other ranks (NVIDIA/nccl#863, #1777). They
    learn that this rank failed only when its process has ended.
    """
    atexit.register(signal.alarm, EXIT_SECONDS)
