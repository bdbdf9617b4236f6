"""Read and write single arrays with a checksum."""

import io
from pathlib import Path

import numpy as np

from mae_et.io.seals import TRAILER_BYTES, check_sealed, sealed_bytes


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file followed by its checksum, which other readers ignore."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    path.write_bytes(sealed_bytes(file.getvalue()))


def read_array(path: Path) -> np.ndarray:
    """Read an array written by `write_array`.

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
    if not isinstance(mapped, np.memmap):  # np.load also opens a zip of several arrays
        raise ValueError("it is not a single array")
    if mapped.offset + mapped.nbytes + TRAILER_BYTES != path.stat().st_size:
        raise ValueError("its length does not match its header")
    return np.array(mapped)
