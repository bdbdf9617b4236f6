"""Choose images that represent a whole list, which is often sorted by class."""

import random
from itertools import pairwise

import numpy as np


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most `most` of `count` indices, in order: the first, the last, some between."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


def drawn_evenly(count: int, most: int) -> list[int]:
    """Return one index of each of `most` equal parts of `count`, in order; the same in every call.

    Constant steps would meet only some of the classes in a list that repeats them in turn.
    """
    edges = [part * count // most for part in range(most + 1)]
    generator = random.Random(0)
    return [generator.randrange(*part) for part in pairwise(edges)]
