"""Seeded colour images of ten object shapes, for a demo without downloads.

Each image is one shape over a background with the 1/f amplitude spectrum of natural scenes. The
shape has a texture of its own (1/f noise and a grating of known frequency) and is lit together with
the background. Position, scale, rotation, colours, textures and light are drawn independently of
the class, so only the silhouette reveals it.

An image depends only on (index, size, seed), on every machine. Its random numbers come from
`numpy.random.RandomState`, whose streams are frozen (NEP 19), unlike those of `default_rng`. All
arithmetic is float64 until one final rounding to uint8, which hides differences in the last bit
between processors and FFT builds.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import RandomState
from PIL import Image

from mae_et.data.sources.shapes import SHAPES

SMALLEST = 16  # pixels; the finest grating, 8 cycles per image, is at the limit of this size

CLASSES: tuple[str, ...] = tuple(SHAPES)

# Rows: red, green and blue of one unit of brightness, blue-yellow and red-green.
_OPPONENT = np.array([[1.0, 1.0, 1.0], [0.7, 0.7, -1.4], [1.2, -1.2, 0.0]])


@dataclass(frozen=True)
class _Scene:
    """The contents of one image except its noise; the same at every image size.

    Lengths are in halves of the image side (the image spans -1 to 1), frequencies in cycles per
    image side, angles in radians, colours in opponent coordinates (see `_OPPONENT`).
    """

    label: int
    extent: float
    centre: tuple[float, float]
    angle: float
    object_colour: np.ndarray
    ground_colour: np.ndarray
    steepness: float  # the noise's amplitude falls as frequency ** -steepness
    spread: np.ndarray  # standard deviation of the background's noise in each opponent channel
    wave: tuple[float, float]  # frequency of the object's grating, stripes in brightness
    wave_deviation: float
    wave_phase: float
    object_noise: float  # standard deviation of the object's own noise, in brightness
    light: tuple[float, float]  # relative change of brightness from the centre to each edge


def _polar(radius: float, angle: float) -> tuple[float, float]:
    return float(radius * np.cos(angle)), float(radius * np.sin(angle))


def _draw_scene(label: int, stream: RandomState) -> _Scene:
    uniform = stream.uniform
    extent = uniform(0.55, 0.85)
    reach = 1 - 0.8 * extent  # a tenth of the object may leave the image at each edge
    # Brightness always differs by at least 0.25, so that the object is visible; a coin toss decides
    # which is brighter, so that pixel values do not reveal the class.
    middle, gap = uniform(0.4, 0.6), uniform(0.25, 0.4) * (1 if uniform() < 0.5 else -1)
    object_tint, ground_tint = uniform(-0.09, 0.09, (2, 2))
    return _Scene(
        label=label,
        extent=extent,
        centre=(uniform(-reach, reach), uniform(-reach, reach)),
        angle=uniform(-np.pi / 6, np.pi / 6),
        object_colour=np.array([middle + gap / 2, *object_tint]),
        ground_colour=np.array([middle - gap / 2, *ground_tint]),
        steepness=uniform(0.8, 1.2),
        spread=uniform(0.02, 0.04) * np.array([1.0, 0.15, 0.15]),
        wave=_polar(uniform(4.0, 8.0), uniform(0, np.pi)),
        wave_deviation=uniform(0.03, 0.06),
        wave_phase=uniform(0, 2 * np.pi),
        object_noise=uniform(0.01, 0.02),
        light=_polar(uniform(0.1, 0.35), uniform(0, 2 * np.pi)),
    )


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres from -1 to 1: x as a row, y (upwards) as a column."""
    line = (2 * np.arange(size) + 1.0) / size - 1
    return line[None, :], -line[:, None]


@lru_cache(maxsize=8)
def _log_frequency(size: int) -> np.ndarray:
    """Natural logarithm of the cycles per image at each bin of a real 2-D transform."""
    rows, columns = np.fft.fftfreq(size, 1 / size), np.fft.rfftfreq(size, 1 / size)
    frequency = np.hypot(rows[:, None], columns[None, :])
    frequency[0, 0] = np.inf  # its weight becomes 0, so the noise has mean 0
    return np.log(frequency)


def _noise(stream: RandomState, count: int, size: int, steepness: float) -> np.ndarray:
    """[count, size, size] fields of mean 0 and deviation 1, amplitude ~ frequency ** -steepness.

    They wrap around: each edge continues at the opposite one.
    """
    spectrum = np.fft.rfft2(stream.random_sample((count, size, size)))
    spectrum *= np.exp(-steepness * _log_frequency(size))
    fields = np.fft.irfft2(spectrum, s=(size, size))
    return fields / np.sqrt(np.mean(fields**2, axis=(1, 2), keepdims=True))


def _coverage(scene: _Scene, size: int) -> np.ndarray:
    """[size, size] fraction of each pixel that the object covers, 0 to 1."""
    x, y = _grid(size)
    x, y = (x - scene.centre[0]) / scene.extent, (y - scene.centre[1]) / scene.extent
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    distance = SHAPES[CLASSES[scene.label]](cos * x + sin * y, cos * y - sin * x)
    return np.clip(0.5 - distance * (scene.extent * size / 2), 0, 1)


def _background(scene: _Scene, stream: RandomState, size: int) -> np.ndarray:
    """[3, size, size] background before lighting, in opponent coordinates."""
    fields = _noise(stream, 3, size, scene.steepness)
    return scene.ground_colour[:, None, None] + scene.spread[:, None, None] * fields


def _texture(scene: _Scene, stream: RandomState, size: int) -> np.ndarray:
    """[size, size] brightness of the object's texture about its mean."""
    x, y = _grid(size)
    phase = np.pi * (scene.wave[0] * x + scene.wave[1] * y) + scene.wave_phase
    stripes = np.sqrt(2) * scene.wave_deviation * np.sin(phase)
    return stripes + scene.object_noise * _noise(stream, 1, size, scene.steepness)[0]


def _start(index: int, seed: int) -> tuple[_Scene, RandomState]:
    """Return the scene of an image, and the stream that its noise comes from."""
    # All 128 bits are the key of the generator's own mixing: no two (seed, index) share one.
    words = [seed % 2**32, seed >> 32, index % 2**32, index >> 32]
    stream = RandomState(words)
    return _draw_scene(index % len(CLASSES), stream), stream


def render(index: int, size: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """Return an image and its label, the position of its class in `CLASSES`.

    A pure function of its arguments. The label is `index % 10`, so any range of consecutive indices
    is balanced to within one. Object, colours and light of an (index, seed) are the same at every
    size; the noise is not.

    Args:
        index: index of the image, from 0 to 2**64 - 1.
        size: side in pixels, at least 16.
        seed: seed of the sequence of images, from 0 to 2**64 - 1.

    Returns:
        uint8 array [size, size, 3] in red, green, blue, and the label from 0 to 9.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if size < SMALLEST:
        raise ValueError(f"size must be at least {SMALLEST} pixels, got {size}")
    for name, value in (("index", index), ("seed", seed)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} must be from 0 to 2**64 - 1, got {value}")
    scene, stream = _start(index, seed)
    canvas = _background(scene, stream, size)
    thing = np.broadcast_to(scene.object_colour[:, None, None], canvas.shape).copy()
    thing[0] += _texture(scene, stream, size)
    canvas += _coverage(scene, size) * (thing - canvas)
    x, y = _grid(size)
    canvas *= 1 + scene.light[0] * x + scene.light[1] * y
    colours = canvas.reshape(3, -1).T @ _OPPONENT
    pixels = np.rint(255 * np.clip(colours, 0, 1)).astype(np.uint8)
    return pixels.reshape(size, size, 3), scene.label


class Synthetic:
    """Images `first` to `first + length - 1` of a seed, rendered on first use and then kept.

    They take `length * size * size * 3` bytes in each worker process, which renders its own copy.
    Sets that do not overlap make a training and a test set.
    """

    classes = CLASSES

    def __init__(self, length: int, size: int, seed: int = 0, first: int = 0) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        render(first, size, seed)  # checks the arguments now, not at the first access
        self.length, self.size, self.seed, self.first = length, size, seed, first
        self._pixels = np.zeros((length, size, size, 3), np.uint8)
        self._filled = np.zeros(length, bool)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        """Return an RGB image of `size` x `size` pixels and its label."""
        i = range(self.length)[i]
        index = self.first + i
        if not self._filled[i]:
            self._pixels[i], _ = render(index, self.size, self.seed)
            self._filled[i] = True
        return Image.fromarray(self._pixels[i]), index % len(CLASSES)
