"""What a reader must not do, as Python's own audit events tell it."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A module of this name lies nowhere: a file that names it must not have it looked for.
BAIT = "evil_module"
RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
             "pickle.find_class", "socket.bind", "socket.connect", "ctypes.dlopen")  # fmt: skip

SECONDS = 10  # of processor time, for each input of each target

IPV6_CHECK = ("::1", 0)  # urllib3 binds to it when it is imported

_seen: list[str] | None = None
_inside: Path | None = None
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None or (event == "socket.bind" and arguments[1] == IPV6_CHECK):
        return
    if event in RUNS_CODE or (event == "import" and str(arguments[0]).startswith(BAIT)):
        _seen.append(f"{event} {arguments!r:.200}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else mode != "r"
        path = Path(os.fsdecode(path))
        if writes and _inside and not path.is_relative_to(_inside) and path != Path(os.devnull):
            _seen.append(f"writes {path}")


@contextmanager
def nothing_runs(folder: Path) -> Iterator[None]:
    """Fail if the block starts a program, unpickles a name, opens a port or writes elsewhere.

    A hook cannot be taken away again, so it sleeps outside of such blocks.
    """
    global _seen, _inside, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    _seen, _inside = [], folder
    try:
        yield
    finally:
        seen, _seen = _seen, None
    assert not seen, seen


@contextmanager
def within(seconds: float = SECONDS) -> Iterator[None]:
    """Fail if the block takes more processor time."""
    before = time.process_time()
    yield
    taken = time.process_time() - before
    assert taken < seconds, f"{taken:.1f} s of processor time"
