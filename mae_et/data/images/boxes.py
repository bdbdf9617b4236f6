"""Regions of images, in pixels."""

from collections.abc import Callable
from typing import NamedTuple

PixelBox = tuple[int, int, int, int]
"""Top, left, height and width, in whole pixels."""


class Box(NamedTuple):
    """A region of an image, in its pixels."""

    top: float
    left: float
    height: float
    width: float

    def scaled(self, rows: float, columns: float) -> "Box":
        """Return the box in an image scaled by these factors."""
        return Box(self.top * rows, self.left * columns, self.height * rows, self.width * columns)


BoxSampler = Callable[[int, int], Box]
"""Maps the height and width of an image to a box."""
