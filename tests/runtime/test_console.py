"""Lines of several threads and processes on one stderr."""

import io
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

from processes import exit_code

from mae_et.runtime.console import null_streams, write_line

FORK = multiprocessing.get_context("fork")


def test_processes_forked_while_a_thread_writes_lines_write_theirs(monkeypatch) -> None:
    """As loader processes that warn of an image, forked beside threads that decode."""
    done = threading.Event()

    def write_lines() -> None:
        while not done.is_set():
            write_line("a line")

    with Path(os.devnull).open("w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        thread = threading.Thread(target=write_lines)
        thread.start()
        try:
            for _ in range(5):
                child = FORK.Process(target=write_line, args=("another",))
                child.start()
                assert exit_code(child, 20) == 0
        finally:
            child.kill()
            done.set()
            thread.join()


def test_streams_are_null_for_new_processes_and_come_back() -> None:
    before = [os.fstat(stream) for stream in (1, 2)]
    with null_streams():
        assert os.path.samestat(os.fstat(1), os.fstat(2))
        assert os.path.samestat(os.fstat(1), Path(os.devnull).stat())
    after = [os.fstat(stream) for stream in (1, 2)]
    assert all(map(os.path.samestat, before, after))


def test_a_process_that_is_killed_while_it_writes_a_line_stops_no_other(monkeypatch) -> None:
    """As a loader process when memory runs out."""

    class Deadly(io.StringIO):
        def write(self, _: str) -> int:
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Deadly())
        child = FORK.Process(target=write_line, args=("a line",))
        child.start()
    assert exit_code(child) == -signal.SIGKILL
    thread = threading.Thread(target=write_line, args=("a line",), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
