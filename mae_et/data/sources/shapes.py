"""Signed distance functions of the ten object shapes of synthetic images."""

from collections.abc import Callable

import numpy as np


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.9


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.72) - 0.23


def _box(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, 0.8, 0.8)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    y = y + 0.25
    return np.maximum(np.abs(x) * np.sqrt(0.75) + y / 2, -y) - 0.56


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sector = np.pi / 5
    angle = np.abs((np.arctan2(x, y) + sector) % (2 * sector) - sector)
    radius = np.hypot(x, y)
    notch_x, notch_y = 0.48 * np.cos(sector), 0.48 * np.sin(sector)
    edge = np.hypot(1 - notch_x, notch_y)  # from the tip at (1, 0) to the notch
    across, along = (1 - notch_x) / edge, notch_y / edge
    return (radius * np.cos(angle) - 1) * along + radius * np.sin(angle) * across


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = x - 0.15
    return np.maximum(np.hypot(x, y) - 0.98, 0.8 - np.hypot(x - 0.5, y))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    side = 0.57  # a square on its corner, and a disc on each of its upper two sides
    right, left = (y + x) * np.sqrt(0.5), (y - x) * np.sqrt(0.5)
    lobes = np.minimum(np.hypot(right - side, left), np.hypot(right, left - side)) - side
    return np.minimum(lobes, _box(right, left, side, side))


def _bars(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(np.abs(x) - 0.6, y, 0.3, 0.9)


def _hourglass(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    slope = np.sqrt(1 + 0.85**2)
    return np.maximum(np.abs(y) - 0.9, (np.abs(x) - 0.85 * np.abs(y) - 0.1) / slope)


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "bars": _bars,
    "hourglass": _hourglass,
}
"""Each takes coordinates in units of half the object's extent, y upwards, and returns the distance
to the outline in the same units: negative inside, and exact near the outline except at corners."""
