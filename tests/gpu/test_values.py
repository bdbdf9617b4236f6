"""Crops, targets, losses and gradients of the GPU are the CPU's, in float32 and in bf16."""

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from natural_images import natural
from small_mae import small
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mae_et.config.model import ModelConfig, Target
from mae_et.curriculum.frequency import low_frequency_crop
from mae_et.data.device_copy import copied
from mae_et.data.train_dataset import Batch
from mae_et.data.transforms import normalise
from mae_et.models.masking import mask_from_noise
from mae_et.models.targets import TARGETS
from mae_et.runtime.precision import autocast
from mae_et.training.efficiency.attention import fits
from mae_et.training.host_copy import HostCopy

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODELS = {
    "norm_pix": {},
    "pixel": {"target": "pixel"},
    "hog": {"target": "hog"},
    "cross": {"decoder_attention": "cross", "decoder_share": 0.5},
    "deep": {"encoder_depth": 4, "decoder_depth": 3},
}


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [8 3 64 64], with the spectrum of photographs."""
    return torch.stack([pil_to_tensor(natural(64, 64, seed)) for seed in range(8)])


def cropped(images: Tensor, bandwidth: int, method: str = "fourier") -> Tensor:
    return normalise(low_frequency_crop(images, bandwidth, method), MEAN, STD)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["fourier", "resize"])
@pytest.mark.parametrize("bandwidth", [16, 24, 40, 64])
def test_crops_are_those_of_the_cpu(
    images: Tensor, device: torch.device, method: str, bandwidth: int
) -> None:
    expected = cropped(images, bandwidth, method)
    found = cropped(images.to(device), bandwidth, method)
    assert found.device == device
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", get_args(Target))
def test_targets_are_those_of_the_cpu(images: Tensor, device: torch.device, target: Target) -> None:
    """A gradient at the edge of two orientations of HOG may fall into the other on a GPU."""
    views = cropped(images, 32)
    compute = TARGETS[target](ModelConfig(patch_size=8, target=target)).compute
    expected, found = compute(views), compute(views.to(device)).cpu()
    far = (found - expected).abs() > 1e-3
    assert far.float().mean() <= (1e-3 if target == "hog" else 0)


def loss_and_gradients(
    name: str, views: Tensor, noise: Tensor, device: torch.device, dtype: torch.dtype | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss [] and the gradient of each weight, on the CPU."""
    model = small(**MODELS[name]).to(device)
    with autocast(dtype, device):
        loss = model(views.to(device), mask_from_noise(noise.to(device), 0.75)).loss
    loss.backward()
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach().cpu(), gradients


@pytest.mark.parametrize("bandwidth", [16, 32])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_cpu(
    images: Tensor, device: torch.device, name: str, bandwidth: int
) -> None:
    """In float32 closely, in bf16 within its rounding."""
    views = cropped(images, bandwidth)
    noise = torch.rand(8, (bandwidth // 8) ** 2, generator=torch.Generator().manual_seed(0))
    loss, gradients = loss_and_gradients(name, views, noise, CPU, None)
    for dtype, tolerance in ((None, 2e-3), (torch.bfloat16, 0.1)):
        found, others = loss_and_gradients(name, views, noise, device, dtype)
        torch.testing.assert_close(found, loss, rtol=tolerance / 10, atol=0)
        assert set(others) == set(gradients)
        for weight, expected in gradients.items():
            difference = (others[weight] - expected).norm()
            assert difference <= tolerance * expected.norm() + 1e-6, (weight, dtype)


def test_batches_keep_their_pixels_until_queued_kernels_have_read_them(
    device: torch.device,
) -> None:
    """Each is dropped while the kernel that reads it waits behind a long one."""
    pixels = torch.arange(16, dtype=torch.uint8)[:, None, None, None, None]
    pixels = pixels.repeat(1, 8, 3, 224, 224)
    pixels = pixels.pin_memory() if device.type == "cuda" else pixels
    stage = torch.zeros(8, dtype=torch.int64)
    read = []
    for batch in copied((Batch(each, torch.rand(8, 4), stage) for each in pixels), device):
        assert batch.images.device == batch.noise.device == device
        if device.type == "cuda":
            torch.cuda._sleep(20_000_000)  # about 10 ms
        read.append(torch.stack(batch.images.aminmax()))
    assert torch.stack(read).tolist() == [[number, number] for number in range(16)]


def test_a_state_in_pinned_memory_outlives_the_next_step(device: torch.device) -> None:
    """Copied behind the kernels that are queued, and before those that change it."""
    weight, host = torch.zeros(2**22, device=device), HostCopy()
    for number in (1, 2):
        if device.type == "cuda":
            torch.cuda._sleep(20_000_000)  # about 10 ms
        weight.fill_(number)
        saved = host.take({"weight": weight, "tail": weight[-3:], "step": torch.ones(()) * number})
        weight.fill_(-1)
        assert saved is not None
        assert saved["weight"].is_pinned() == (device.type == "cuda")
        assert saved["weight"].untyped_storage().data_ptr() == (
            saved["tail"].untyped_storage().data_ptr()
        )
        assert (saved["weight"] == number).all()
        assert saved["step"] == number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [10, 26, 37, 50, 101, 197])
def test_short_attention_has_the_values_and_gradients_of_softmax(
    device: torch.device, tokens: int, dtype: torch.dtype
) -> None:
    """As close to float64 as PyTorch's, and the same at each call."""
    if device.type != "cuda":
        pytest.skip("tests/training/test_attention.py has the interpreter")
    kernels = pytest.importorskip("mae_et.training.efficiency.short_attention")
    heads, width = (12, 64) if fits(tokens, 64) else (16, 32)
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(8, tokens, 3 * heads * width, generator=draw).to(dtype)
    grad = torch.randn(8, tokens, heads * width, generator=draw).to(dtype)

    def plain(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def both(attend: Any, inputs: Tensor, grad: Tensor) -> list[Tensor]:
        inputs = inputs.detach().requires_grad_()
        result = attend(inputs)
        return [
            each.double().cpu() for each in (result, *torch.autograd.grad(result, inputs, grad))
        ]

    ours = both(lambda qkv: kernels.short_attention(qkv, heads), qkv.to(device), grad.to(device))
    again = both(lambda qkv: kernels.short_attention(qkv, heads), qkv.to(device), grad.to(device))
    theirs = both(plain, qkv.to(device), grad.to(device))
    for one, other, torchs, exact in zip(
        ours, again, theirs, both(plain, qkv.double(), grad.double()), strict=True
    ):
        assert torch.equal(one, other)
        assert (one - exact).norm() < 1.2 * (torchs - exact).norm()
