"""Arrays of other files' places and names, read so that a file can neither run code nor lie."""

from pathlib import Path

import numpy as np


def read_array(path: Path) -> np.ndarray:
    """Return the array of a `.npy` file, which must be as long as its header says.

    Raises:
        ValueError: it is damaged, or holds Python objects (which are pickled).
        OSError: it cannot be read.
    """
    try:
        # Mapped first: memory is taken only for what is there, whatever shape the header claims.
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of its header numpy raises what it stumbles on
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not isinstance(mapped, np.ndarray):  # an archive of several, which starts as a zip does
        raise ValueError("it is no array")
    return np.array(mapped)
