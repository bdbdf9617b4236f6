"""Low-frequency cropping: keep the centre of an image's spectrum, at the size of that centre.

For an image X of H x W and a bandwidth B (EfficientTrain, arXiv 2211.09703, section 3.1):

    crop(X, B) = Re( IDFT( centre_BxB( F(X) ) ) ) * B*B / (H*W)

The transform is separable: with the complex B x H matrix A = `IDFT . centre . DFT * B / H` it is
`Re(A) X Re(A)^T - Im(A) X Im(A)^T`, two matrix products instead of two FFTs. Only the Nyquist line
k = -B/2 of an even bandwidth has no mirror image in the window, so it alone makes A complex, and
Im(A) has rank one: its product costs next to nothing, and dropping it would not be exact.

Tested properties: the crop preserves the mean; crop(X, H) = X; crop(crop(X, B1), B2) = crop(X, B2)
for B2 <= B1; linearity. Output sample b sits at input position b*H/B (not at the pixel centre), so
the crop of a mirrored image is the mirrored crop shifted by 1 - B/H of an output sample.
"""

from collections.abc import Sequence
from operator import index
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.config.schema import Method
from mae_et.errors import require_choice
from mae_et.runtime.precision import exact_products, full_precision
from mae_et.runtime.tensor_cache import cache_tensors


def low_frequency_crop(
    images: Tensor, bandwidth: int | tuple[int, int], method: Method = "fourier"
) -> Tensor:
    """Crop the spectrum of images to its low frequencies.

    Half-precision images are computed in float32 and cast back, also under autocast. The crop keeps
    constants: normalise its result, which has fewer pixels than the images.

    Args:
        images: [..., H, W]; uint8 is scaled from [0, 255] to [0, 1], floating point is not.
        bandwidth: side B of the result in pixels, or (height, width); 1 <= B <= H, W.
        method: `fourier` is the exact crop (EfficientTrain, section 3.1). `resize` is antialiased
            bicubic interpolation, 24 to 44 dB from the exact crop (least for textures; see
            docs/compared.md); the paper's released code instead resizes 8-bit images with Pillow's
            Lanczos filter in its loader, 39 to 51 dB from this. `decode`: the loader has already
            resized the training images; other images are treated as with `resize`.

    Returns:
        [..., B, B], on the images' device, float32 of uint8 and otherwise with the images' dtype;
        at full bandwidth, floating-point images themselves.

    Raises:
        TypeError: the bandwidth is not a whole number.
        ValueError: the bandwidth is below 1 or above the size, the images are other integers, or
            the method is unknown.
    """
    images = images / 255 if images.dtype == torch.uint8 else images
    height, width = _checked_sides(images, bandwidth)
    require_choice(method, Method, "method")
    if (height, width) == images.shape[-2:]:
        return images
    # The crop prepares data: it must not depend on half precision or TF32.
    with full_precision(images.device), exact_products():
        exact = images.to(torch.promote_types(images.dtype, torch.float32))
        reduce = _fourier if method == "fourier" else _resize
        return reduce(exact, height, width).to(images.dtype)


def _checked_sides(images: Tensor, bandwidth: int | tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of a bandwidth; see `low_frequency_crop`."""
    sides = bandwidth if isinstance(bandwidth, Sequence) else (bandwidth, bandwidth)
    height, width = map(index, sides)
    full_height, full_width = images.shape[-2:]
    if not (1 <= height <= full_height and 1 <= width <= full_width):
        raise ValueError(
            f"bandwidth {height} x {width} must lie between 1 and the image's size "
            f"{full_height} x {full_width}"
        )
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
    return height, width


def _fourier(images: Tensor, height: int, width: int) -> Tensor:
    full_height, full_width = images.shape[-2:]
    rows = crop_matrix(full_height, height, images.device, images.dtype)
    columns = crop_matrix(full_width, width, images.device, images.dtype)
    real = rows.real @ images @ columns.real.mT
    corner = torch.einsum("h,...hw,w->...", rows.wave, images, columns.wave)
    signed = corner[..., None, None] * rows.signs[:, None]
    return torch.addcmul(real, signed, columns.signs, value=-1)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    flat = images.reshape(-1, 1, *images.shape[-2:])
    resized = F.interpolate(flat, (height, width), mode="bicubic", antialias=True)
    return resized.reshape(*images.shape[:-2], height, width)


def low_pass(images: Tensor, bandwidth: int | tuple[int, int]) -> Tensor:
    """Low-pass filter images without changing their size.

    Cropping the result to the same bandwidth equals cropping the images. Half-precision images are
    computed in float32 and cast back.

    Args:
        images: floating point, [..., H, W].
        bandwidth: side B in pixels, which keeps B / 2 cycles along each axis, or (height, width);
            with the aspect ratio of the images, the filter is isotropic.

    Returns:
        [..., H, W], with dtype and device of the images.

    Raises:
        TypeError, ValueError: as `low_frequency_crop`.
    """
    sides = _checked_sides(images, bandwidth)
    with full_precision(images.device):
        spectrum = torch.fft.fft2(images.to(torch.promote_types(images.dtype, torch.float32)))
        for axis, side in zip((-2, -1), sides, strict=True):
            size = images.shape[axis]
            frequency = (size * torch.fft.fftfreq(size, device=images.device)).round()
            kept = frequency.abs() <= side / 2  # both Nyquist lines, to keep the result real
            spectrum = spectrum * (kept[:, None] if axis == -2 else kept)
        return torch.fft.ifft2(spectrum).real.to(images.dtype)


class CropMatrix(NamedTuple):
    """One axis of the crop: `A = real + i * outer(signs, wave)`."""

    real: Tensor
    """[B, H]"""
    signs: Tensor
    """[B], the alternating signs of the Nyquist line's column."""
    wave: Tensor
    """[H], the Nyquist line's row; zero if the bandwidth is odd or full."""


@cache_tensors(maxsize=64)
def crop_matrix(size: int, bandwidth: int, device: torch.device, dtype: torch.dtype) -> CropMatrix:
    """Return the cached matrix that maps an axis of `size` samples to `bandwidth` samples."""
    outputs = torch.arange(bandwidth, dtype=torch.float64)
    inputs = torch.arange(size, dtype=torch.float64)
    frequencies = outputs - bandwidth // 2
    synthesis = 2 * torch.pi * torch.outer(outputs / bandwidth, frequencies)
    analysis = 2 * torch.pi * torch.outer(frequencies, inputs / size)
    real = synthesis.cos() @ analysis.cos() + synthesis.sin() @ analysis.sin()
    nyquist = (torch.pi * bandwidth * inputs / size).sin()
    one_sided = bandwidth % 2 == 0 and bandwidth < size
    parts = real / size, 1 - 2 * (outputs % 2), nyquist / size * one_sided
    return CropMatrix(*(part.to(device, dtype) for part in parts))
