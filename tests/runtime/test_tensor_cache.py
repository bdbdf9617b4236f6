import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mae_et.curriculum.frequency import low_frequency_crop
from mae_et.data.transforms import normalise
from mae_et.models.pos_embed import sincos_positions


class Prepared(nn.Module):
    """What is cached on a device: the crop's matrices, statistics and positions."""

    def forward(self, images: Tensor) -> Tensor:
        images = normalise(low_frequency_crop(images, 6), (0.25,), (0.75,))
        return images + sincos_positions((2, 3), (5, 7), 8, images.device).sum()


@pytest.mark.parametrize(("first", "size"), [("export", 11), ("fake", 12), ("inference", 13)])
def test_cached_tensors_serve_later_callers_whatever_the_first_one_did(
    first: str, size: int
) -> None:
    """They stay real after fake tensors, and can be differentiated through after inference."""
    model, images = Prepared(), torch.rand(1, 1, size, size, requires_grad=True)
    if first == "export":
        torch.export.export(model, (images.detach(),), strict=False)
    elif first == "fake":
        with FakeTensorMode():
            model(torch.rand(1, 1, size, size))
    else:
        with torch.inference_mode():
            model(images)
    result = model(images)
    result.sum().backward()
    assert type(result) is Tensor
    assert images.grad is not None
    assert images.grad.isfinite().all()
