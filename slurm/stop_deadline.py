"""End a process that does not stop in time, such as one blocked in a collective."""

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mae_et.runtime.watchdog import EXIT_STATUS

WATCHED = frozenset({signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM})


@contextmanager
def stop_deadline(grace: float, act: Callable[[int], None]) -> Iterator[None]:
    """End the process if the block does not end within `grace` seconds after a first signal.

    Python runs signal handlers in the main thread, between two bytecode instructions; a main thread
    that waits in C++ for a lost peer never runs them. The interpreter's wake-up descriptor is
    written at once, so a separate thread reads it, which calls `act` before the process ends.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in WATCHED and not over.wait(grace):
                faulthandler.dump_traceback(all_threads=True)
                try:
                    act(number[0])
                finally:
                    os._exit(EXIT_STATUS)
        os.close(reader)

    kept = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(kept)
        os.close(writer)  # ends the thread's read
