"""Turn stop signals into a flag that the training loop reads between steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# SIGHUP arrives when a run's terminal is closed or its connection lost.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


class StopFlag:
    """The signal that requested a stop, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Turn SIGTERM, SIGINT, SIGUSR2 and SIGHUP into a flag that the loop reads between steps.

    A second SIGINT stops at once. Under nohup, SIGHUP stays ignored.
    """
    flag = StopFlag()

    def raise_flag(number: int, frame: object) -> None:
        if flag.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.signal = number

    if threading.current_thread() is not threading.main_thread():
        yield flag  # only the main thread may install handlers
        return
    wanted = set(STOP_SIGNALS)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        wanted.remove(signal.SIGHUP)
    kept = {number: signal.signal(number, raise_flag) for number in wanted}
    try:
        yield flag
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
