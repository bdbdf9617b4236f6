"""Low-frequency cropping: keep the centre of an image's spectrum, at the size of that centre.

For an image X of H x W and a bandwidth B (EfficientTrain, arXiv 2211.09703, section 3.1):

    crop(X, B) = Re( IDFT( centre_BxB( F(X) ) ) ) * B*B / (H*W)

The transform is separable, so with A the complex B x H matrix `IDFT . centre . DFT * B / H` it is
`Re(A) X Re(A)^T - Im(A) X Im(A)^T`: two matrix products instead of two FFTs. Only the Nyquist line
k = -B/2 of an even bandwidth has no mirror image in the window, so it alone makes A complex, and
Im(A) has rank one: its product costs next to nothing, and leaving it out would not be exact.

What holds, and is tested: the mean is kept; crop(X, H) = X; crop(crop(X, B1), B2) = crop(X, B2) for
B2 <= B1; linearity. Output sample b sits at input position b*H/B (not at the pixel centre), so the
crop of a mirrored image is the mirrored crop shifted by 1 - B/H of an output sample.
"""

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.runtime.precision import exact_products, full_precision

Method = Literal["fourier", "resize", "decode"]


def low_frequency_crop(
    images: Tensor, bandwidth: int | tuple[int, int], method: Method = "fourier"
) -> Tensor:
    """Reduce images to their low frequencies.

    Args:
        images: floating point, [..., H, W].
        bandwidth: side B of the result in pixels, or (height, width).
        method: `fourier` is the exact crop; `resize` is antialiased bicubic resizing, which stands
            for it in the paper's released code (28 to 39 dB from the exact crop). With `decode`
            the loader has resized images to be trained on, and they pass unchanged; others are
            resized as with `resize`.

    Returns:
        [..., B, B], of the dtype and on the device of the images.

    Raises:
        ValueError: a bandwidth below 1 or above the size, images of integers, an unknown method.
    """
    height, width = (bandwidth, bandwidth) if isinstance(bandwidth, int) else bandwidth
    full_height, full_width = images.shape[-2:]
    if not (1 <= height <= full_height and 1 <= width <= full_width):
        raise ValueError(
            f"bandwidth {height} x {width} must lie between 1 and the image's size "
            f"{full_height} x {full_width}"
        )
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point, got {images.dtype}")
    if (height, width) == (full_height, full_width):
        return images
    if method in {"resize", "decode"}:
        flat = images.reshape(-1, 1, full_height, full_width)
        resized = F.interpolate(flat, (height, width), mode="bicubic", antialias=True)
        return resized.reshape(*images.shape[:-2], height, width)
    if method != "fourier":
        raise ValueError(f"method must be fourier, resize or decode, got {method!r}")
    # The crop is data, not network: neither half precision nor TF32 may touch it.
    with full_precision(images.device), exact_products():
        rows = crop_matrix(full_height, height, images.device, images.dtype)
        columns = crop_matrix(full_width, width, images.device, images.dtype)
        real = rows.real @ images @ columns.real.mT
        corner = torch.einsum("h,...hw,w->...", rows.wave, images, columns.wave)
        return real - corner[..., None, None] * torch.outer(rows.signs, columns.signs)


def low_pass(images: Tensor, bandwidth: int) -> Tensor:
    """Blur images [..., H, W] of floating point: keep a bandwidth's frequencies, and the size.

    The crop of what is returned, at the same bandwidth, is the crop of the images.
    """
    with full_precision(images.device):
        spectrum = torch.fft.fft2(images)
        for axis in (-2, -1):
            size = images.shape[axis]
            frequency = (size * torch.fft.fftfreq(size, device=images.device)).round()
            kept = frequency.abs() <= bandwidth / 2  # both ends: the result is real
            spectrum = spectrum * (kept[:, None] if axis == -2 else kept)
        return torch.fft.ifft2(spectrum).real


class CropMatrix:
    """One axis of the crop: `A = real + i * outer(signs, wave)`.

    Attributes:
        real: [B, H].
        signs: [B], the alternating signs of the Nyquist line's column.
        wave: [H], its row; zero where the bandwidth is odd or full.
    """

    def __init__(self, size: int, bandwidth: int, device: torch.device, dtype: torch.dtype):
        outputs = torch.arange(bandwidth, dtype=torch.float64)
        inputs = torch.arange(size, dtype=torch.float64)
        frequencies = torch.arange(bandwidth, dtype=torch.float64) - bandwidth // 2
        synthesis = 2 * torch.pi * torch.outer(outputs / bandwidth, frequencies)
        analysis = 2 * torch.pi * torch.outer(frequencies, inputs / size)
        real = synthesis.cos() @ analysis.cos() + synthesis.sin() @ analysis.sin()
        nyquist = (torch.pi * bandwidth * inputs / size).sin()
        one_sided = bandwidth % 2 == 0 and bandwidth < size
        self.real = (real / size).to(device, dtype)
        self.signs = (1 - 2 * (outputs % 2)).to(device, dtype)
        self.wave = (nyquist / size * one_sided).to(device, dtype)


@lru_cache(maxsize=64)
def crop_matrix(size: int, bandwidth: int, device: torch.device, dtype: torch.dtype) -> CropMatrix:
    """Return the cached matrix that takes an axis of `size` samples to `bandwidth` samples."""
    return CropMatrix(size, bandwidth, device, dtype)
