"""Files of arrays: written with a checksum, read without running code that a pickle names.

A pickle names functions to call. The five names known here build numpy arrays; no other name is
looked up, so a file that was tampered with cannot run code whatever its checksum.
"""

import codecs
import io
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np

from mae_et.io.seals import TRAILER_BYTES, check_sealed, sealed_bytes

_RECONSTRUCT = np.empty(0).__reduce__()[0]
ARRAY_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
    # Where numpy 1 and 2 keep the function that allocates an array for the pickle to fill.
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}
_swapping = threading.Lock()


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file with its checksum after it, which other readers of arrays skip."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    path.write_bytes(sealed_bytes(file.getvalue()))


def read_array(path: Path) -> np.ndarray:
    """Return the array that `write_array` wrote.

    Raises:
        ValueError: the file does not match its checksum or holds Python objects.
        OSError: the file cannot be read.
    """
    check_sealed(path)
    try:
        # Map first: memory is allocated for the bytes present, whatever shape the header claims.
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        raise
    except Exception as error:  # numpy's header parser raises many types
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not isinstance(mapped, np.memmap):  # np.load opens a zip of several arrays too
        raise ValueError("it is not a single array")
    if mapped.offset + mapped.nbytes + TRAILER_BYTES != path.stat().st_size:
        raise ValueError("its length does not match its header")
    return np.array(mapped)


class ArrayUnpickler(pickle.Unpickler):
    """Unpickle plain types and numpy arrays only."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up one of `ARRAY_NAMES`; refuse all others."""
        if (module, name) not in ARRAY_NAMES:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is refused")
        return ARRAY_NAMES[module, name]


def load_arrays(file: IO[bytes], encoding: str = "ASCII") -> Any:
    """Read a pickle of plain types and numpy arrays only, with the signature of `pickle.load`."""
    return ArrayUnpickler(file, encoding=encoding).load()


@contextmanager
def arrays_only(module: Any) -> Iterator[None]:
    """Replace `module.pickle`, so that its calls of `pickle.load` become `load_arrays`.

    A lock keeps one thread from restoring `pickle` while another reads.
    """
    with _swapping:
        before = module.pickle
        module.pickle = SimpleNamespace(load=load_arrays)
        try:
            yield
        finally:
            module.pickle = before
