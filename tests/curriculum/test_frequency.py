import numpy as np
import pytest
import torch
from oracles import fft_crop
from safetensors.torch import load_file
from tiny_run import GOLDEN

from mae_et import low_frequency_crop
from mae_et.curriculum.frequency import low_pass
from mae_et.data.transforms import normalise


def images(
    height: int, width: int | None = None, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.rand(2, 3, height, width or height, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    ("size", "bandwidth"),
    [(224, 96), (224, 160), (224, 192), (64, 32), (30, 15), (31, 16), (33, 7)],
)
def test_matrix_form_equals_the_fft_in_float64(size: int, bandwidth: int) -> None:
    x = images(size)
    expected = fft_crop(x.numpy(), bandwidth)
    assert np.abs(low_frequency_crop(x, bandwidth).numpy() - expected).max() < 1e-12


def test_rectangles_are_cropped_along_each_axis_separately() -> None:
    x = images(48, 80)
    expected = fft_crop(x.numpy(), 32)
    assert np.abs(low_frequency_crop(x, 32).numpy() - expected).max() < 1e-12
    both = low_frequency_crop(low_frequency_crop(x, (23, 80)), (23, 41))
    torch.testing.assert_close(low_frequency_crop(x, (23, 41)), both, rtol=0, atol=1e-12)


def test_golden_file_is_matched_to_float32_precision() -> None:
    golden = load_file(GOLDEN / "low_frequency_crop_numpy.safetensors")
    for bandwidth in (32, 48, 64, 80):
        cropped = low_frequency_crop(golden["images"], bandwidth)
        torch.testing.assert_close(cropped, golden[f"crop_{bandwidth}"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("method", ["fourier", "resize"])
def test_full_bandwidth_returns_the_image(method: str) -> None:
    x = images(32)
    assert torch.equal(low_frequency_crop(x, 32, method), x)


@pytest.mark.parametrize("bandwidth", [1, 2, 15, 16, 30])
def test_crop_preserves_the_mean(bandwidth: int) -> None:
    x = images(32)
    cropped = low_frequency_crop(x, bandwidth)
    torch.testing.assert_close(cropped.mean((-2, -1)), x.mean((-2, -1)), rtol=0, atol=1e-12)


def test_crop_of_a_crop_equals_the_smaller_crop() -> None:
    x = images(64)
    for first in (32, 48, 49):
        twice = low_frequency_crop(low_frequency_crop(x, first), 32)
        torch.testing.assert_close(twice, low_frequency_crop(x, 32), rtol=0, atol=1e-12)


def test_crop_is_linear() -> None:
    x, y = images(32), images(32).flip(0) ** 2
    combined = low_frequency_crop(2 * x - 3 * y, 16)
    torch.testing.assert_close(
        combined, 2 * low_frequency_crop(x, 16) - 3 * low_frequency_crop(y, 16), rtol=0, atol=1e-12
    )


def test_resizing_is_close_to_the_exact_crop_of_a_smooth_image() -> None:
    axis = torch.linspace(0, 2 * torch.pi, 65)[:-1]
    x = (torch.sin(axis)[:, None] * torch.cos(2 * axis)[None, :])[None].double()
    error = low_frequency_crop(x, 32, "resize") - low_frequency_crop(x, 32)
    assert error.abs().max() < 0.16  # half an input sample of shift at this slope
    assert error.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["fourier", "resize"])
@pytest.mark.parametrize(("size", "bandwidth"), [(224, 96), (224, 160), (64, 48), (33, 7)])
def test_half_precision_images_are_cropped_as_exactly_as_float64_ones(
    dtype: torch.dtype, method: str, size: int, bandwidth: int
) -> None:
    """Only the result is rounded: half-precision matrices were off by up to 2% of the range."""
    for x in (images(size), (images(size) - 0.45) / 0.225):
        half = x.to(dtype)
        cropped = low_frequency_crop(half, bandwidth, method)
        assert cropped.dtype == dtype
        expected = low_frequency_crop(half.double(), bandwidth, method)
        rounding = expected.abs() * torch.finfo(dtype).eps / 2
        assert ((cropped.double() - expected).abs() <= 1e-5 * x.abs().max() + rounding).all()


def test_low_pass_accepts_half_precision() -> None:
    x = images(32).bfloat16()
    assert low_pass(x, 16).dtype == torch.bfloat16
    assert (low_pass(x, 16) - low_pass(x.double(), 16)).abs().max() < 2**-8


def test_autocast_does_not_touch_the_crop() -> None:
    x = images(32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = low_frequency_crop(x, 16)
    assert torch.equal(inside, low_frequency_crop(x, 16))


@pytest.mark.slow  # PyTorch imports sympy
@pytest.mark.parametrize("method", ["fourier", "resize"])
def test_the_crop_compiles_to_one_graph(method: str) -> None:
    def crop(x: torch.Tensor) -> torch.Tensor:
        return low_frequency_crop(x, 16, method)

    x = images(32, dtype=torch.float32)
    assert torch.equal(torch.compile(crop, fullgraph=True, backend="aot_eager")(x), crop(x))


@pytest.mark.parametrize(
    ("bandwidth", "sentence"),
    [
        (0, "between 1 and"),
        (33, "between 1 and"),
        ((16, 40), "32 x 32"),
        ((16, 0), "16 x 0"),
        ((0, 16), "0 x 16"),
    ],
)
def test_impossible_bandwidths_raise(bandwidth: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        low_frequency_crop(images(32), bandwidth)


@pytest.mark.parametrize("method", ["fourier", "resize", "decode"])
@pytest.mark.parametrize("bandwidth", [16, 32])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalising_the_crop_crops_the_normalised_images(method, bandwidth, dtype) -> None:
    x = (255 * images(32)).to(dtype)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    expected = low_frequency_crop(normalise(x, mean, std), bandwidth, method)
    found = normalise(low_frequency_crop(x, bandwidth, method), mean, std)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert bandwidth < 32 or torch.equal(found, expected)


def test_integer_images_and_unknown_methods_raise() -> None:
    with pytest.raises(ValueError, match="uint8 or floating point"):
        low_frequency_crop(torch.zeros(3, 32, 32, dtype=torch.int16), 16)
    with pytest.raises(ValueError, match="fourier, resize, decode"):
        low_frequency_crop(images(32), 16, "lanczos")  # type: ignore[arg-type]
