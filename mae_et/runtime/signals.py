"""Handle stop signals: a training stops after its next step, other commands at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mae_et.errors import Stopped

# SIGHUP arrives when a run's terminal is closed or its connection is lost.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


# A signal whose `Stopped` may have been swallowed: some imports are wrapped in a bare except.
_pending: int | None = None


@dataclass
class StopFlag:
    """The signal that requested a stop."""

    signal: int | None = None
    """Number of the signal; None before one arrives."""
    saves: bool = False
    """Whether a signal only sets the flag, because there is state to save."""


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Handle SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP inside the block.

    They raise `Stopped`, or only set the flag if `saves` is true; then a second SIGINT stops as
    soon as a write in progress has ended, and a third kills the process. At the end of the block, a
    pending signal is passed to the previous handler. Under nohup, SIGHUP stays ignored.
    """
    global _pending
    flag = StopFlag()

    def handle(number: int, frame: object) -> None:
        global _pending
        if flag.saves and flag.signal == number == signal.SIGINT:
            # A third exception would release the run folder while a thread writes to it.
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        flag.signal = number
        if not flag.saves:
            _pending = number
            raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield flag  # only the main thread may install handlers
        return
    if _pending is not None:
        raise Stopped(_pending)
    wanted = set(STOP_SIGNALS)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        wanted.remove(signal.SIGHUP)
    kept = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield flag
    finally:
        _pending = None
        for number, handler in kept.items():
            signal.signal(number, handler)
    if flag.signal is not None:
        signal.raise_signal(flag.signal)
