"""Read a pickle of plain types and numpy arrays, as CIFAR's files are; all else is refused.

A pickle names functions to call. Here four names are known, which make arrays, and no other is
looked up, so a file that somebody has changed cannot run code whatever its checksum.
"""

import codecs
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

_FROM = "_reconstruct"
_replacing = threading.Lock()
KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
    # Where numpy 1 and 2 keep it; what it makes is filled in by the pickle.
    ("numpy.core.multiarray", _FROM): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", _FROM): np.empty(0).__reduce__()[0],
}


class PlainUnpickler(pickle.Unpickler):
    """Knows no names but those of arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a known name means.

        Raises:
            UnpicklingError: it is not known.
        """
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is refused")
        return KNOWN[module, name]


def load(file: IO[bytes], encoding: str = "ASCII") -> Any:
    """Read a pickle, as `pickle.load` does.

    Raises:
        UnpicklingError: it holds more than arrays and plain types.
    """
    return PlainUnpickler(file, encoding=encoding).load()


@contextmanager
def unpickling_plainly(module: Any) -> Iterator[None]:
    """Have another module, which calls `pickle.load`, read pickles so; then put its own way back.

    One thread at a time, or one would put it back while another reads.
    """
    with _replacing:
        before = module.pickle
        module.pickle = sys.modules[__name__]
        try:
            yield
        finally:
            module.pickle = before
