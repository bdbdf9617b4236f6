"""End a process that does not stop in time, such as one blocked in a collective."""

import faulthandler
import os
import signal
import threading
from collections.abc import Callable

WATCHED = frozenset({signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM})
EXIT_STATUS = 75  # EX_TEMPFAIL: try again later


class StopDeadline:
    """End the process if the block does not end within a grace period after a signal.

    Python runs signal handlers in the main thread, between two bytecode instructions; a main thread
    that waits in C++ for a lost peer never runs them. The interpreter's wake-up descriptor is
    written at once, so a separate thread reads it.

    Args:
        grace: seconds from the first signal.
        act: called with the signal, in the thread, before the process ends.
    """

    def __init__(self, grace: float, act: Callable[[int], None]):
        self.grace, self.act = grace, act
        self.over = threading.Event()

    def __enter__(self) -> "StopDeadline":
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.kept = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        signal.set_wakeup_fd(self.kept)
        os.close(self.writer)  # ends the thread's read

    def _watch(self) -> None:
        while number := os.read(self.reader, 1):
            if number[0] in WATCHED and not self.over.wait(self.grace):
                faulthandler.dump_traceback(all_threads=True)
                try:
                    self.act(number[0])
                finally:
                    os._exit(EXIT_STATUS)
        os.close(self.reader)
