"""Choose images that represent a whole list, which is often sorted by class."""

import numpy as np


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most `most` of `count` indices, in order: the first, the last, some between."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()
