"""Images with the spectrum of photographs, and their JPEGs."""

import io

import numpy as np
from PIL import Image


def natural(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise whose amplitude falls as 1/f in brightness and faster in colour, as in photographs."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])

    def field(power: float) -> np.ndarray:
        noise = np.fft.fft2(rng.standard_normal((height, width)))
        values = np.fft.ifft2(noise / np.maximum(f, 1 / width) ** power).real
        return (values - values.mean()) / values.std()

    grey = 128 + 42 * field(1.2)
    pixels = np.stack([grey + 12 * field(2) for _ in range(3)], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()
