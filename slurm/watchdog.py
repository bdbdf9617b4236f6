"""End a process that was told to stop and does not: blocked in a collective, it runs no handler."""

import faulthandler
import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType

WATCHED = frozenset({signal.SIGUSR2, signal.SIGTERM})
EXIT_STATUS = 75  # EX_TEMPFAIL: try again later


class Watchdog:
    """A thread that sees signals the moment they come, and acts if the block goes on too long.

    Python runs handlers in the main thread, between two instructions of its own; a thread that
    waits in C++ for a peer that is gone never comes to it. The interpreter's wake-up descriptor is
    written to at once.

    Args:
        grace: seconds from the first signal.
        act: called with the signal before the process ends; not in the main thread.
    """

    def __init__(self, grace: float, act: Callable[[int], None]):
        self.grace, self.act = grace, act
        self.over = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.kept = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.over.set()
        signal.set_wakeup_fd(self.kept)
        os.close(self.writer)  # which ends the thread's read

    def _watch(self) -> None:
        while number := os.read(self.reader, 1):
            if number[0] in WATCHED and not self.over.wait(self.grace):
                faulthandler.dump_traceback(all_threads=True)
                try:
                    self.act(number[0])
                finally:
                    os._exit(EXIT_STATUS)
        os.close(self.reader)
