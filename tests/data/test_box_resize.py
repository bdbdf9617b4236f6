"""Boxes of many images are resized at once, each as torchvision resizes it alone."""

import importlib
import sys

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from mae_et.data.device import box_resize
from mae_et.data.device.box_resize import ONE, filter_weights
from mae_et.data.images.boxes import PixelBox

KERNELS = "mae_et.data.device.box_resize_triton"


def images_and_boxes(count: int, largest: int = 150) -> tuple[list[Tensor], list[PixelBox]]:
    """Return images of noise, the hardest to resize, and boxes of all sizes and shapes."""
    draw = torch.Generator().manual_seed(0)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    images, boxes = [], []
    for _ in range(count):
        height, width = integer(1, largest), integer(1, largest)
        shape = (3, height, width)
        images.append(torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8))
        h, w = integer(1, height), integer(1, width)
        boxes.append((integer(0, height - h), integer(0, width - w), h, w))
    return images, boxes


def resized(images: list[Tensor], boxes: list[PixelBox], size: int) -> Tensor:
    return box_resize.resize_boxes(images, boxes, [False] * len(images), size)


@pytest.mark.parametrize("size", [17, 48])
def test_a_box_is_within_one_level_of_torchvisions_antialiased_crop(size: int) -> None:
    images, boxes = images_and_boxes(60)
    expected = [
        resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        for image, box in zip(images, boxes, strict=True)
    ]
    difference = (resized(images, boxes, size).int() - torch.stack(expected).int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.06


def test_an_image_does_not_depend_on_the_others_of_its_batch(monkeypatch) -> None:
    images, boxes = images_and_boxes(30)
    together = resized(images, boxes, 24)
    alone = [resized([i], [b], 24) for i, b in zip(images, boxes, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    monkeypatch.setattr(box_resize, "MAX_NUMBERS", 3 * 100 * 100 * 4)
    assert torch.equal(together, resized(images, boxes, 24))


def test_products_are_exact_in_tf32() -> None:
    """Rounding their operands to TF32's 11 bits changes nothing, and float32 holds every sum."""
    sides = (1, 2, 3, 7, 33, 96, 97, 500, 1000, 5000)
    for size in (2, 16, 96, 224):
        weights = filter_weights(sides, size, max(sides))
        assert torch.equal(weights.sum(-1), torch.full(weights.shape[:2], float(ONE)))
        overshoot = (weights.clamp(min=0).sum(-1).max() / ONE).item()  # of the first product
        for part, unit in zip(box_resize._parts(weights), (box_resize.COARSE, 1), strict=True):
            whole = part / unit
            assert torch.equal(whole, whole.round())
            assert whole.abs().max() <= 2**8
            assert whole.abs().sum(-1).max() * 255 * overshoot * box_resize.QUARTERS < 2**24
        assert 255 * overshoot * box_resize.QUARTERS < 2**11


def test_a_constant_image_stays_constant_and_a_whole_box_of_the_size_stays_as_it_is() -> None:
    constant = torch.full((3, 70, 41), 77, dtype=torch.uint8)
    assert (resized([constant], [(3, 1, 50, 39)], 24) == 77).all()
    image = torch.randint(0, 256, (3, 30, 30), dtype=torch.uint8)
    assert torch.equal(resized([image], [(2, 5, 24, 24)], 24)[0], image[:, 2:26, 5:29])


@pytest.mark.parametrize("capability", [90, pytest.param(75, marks=pytest.mark.slow)])
def test_kernels_of_triton_compile_for_gpus_that_are_not_here(
    tmp_path, monkeypatch, capability: int
) -> None:
    """For a GPU with a JPEG engine and Triton's oldest, by the assembler in its wheel."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = importlib.import_module(KERNELS)
    types = {
        "table": "*i64",
        "first": "*i32",
        "weights": "*i32",
        "narrow": "*i16",
        "resized": "*u8",
    }
    types |= dict.fromkeys(("taps", "size", "rows"), "i32")
    constants = {"shift": 13, "block_y": kernels.BLOCK_Y, "block_x": kernels.BLOCK_X}
    for kernel in (kernels._narrow, kernels._square):
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]


def test_kernels_of_triton_return_the_same_bit_for_bit(monkeypatch) -> None:
    """In Triton's interpreter: odd sizes, single pixels, strides, flips, several groups."""
    pytest.importorskip("triton", minversion="3.8", reason="older interpreters need NumPy < 2.4")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)
    kernels = importlib.import_module(KERNELS)
    del sys.modules[KERNELS]  # others compile them
    images, boxes = images_and_boxes(4, 30)
    images += [
        images[0][:1].expand(3, -1, -1),
        images[1].mT,
        torch.full((3, 9, 9), 255, dtype=torch.uint8),
        torch.randint(0, 256, (3, 1, 97), dtype=torch.uint8),
    ]
    top, left, height, width = boxes[1]
    boxes += [boxes[0], (left, top, width, height), (4, 8, 1, 1), (0, 0, 1, 97)]
    flips = [number % 2 == 0 for number in range(len(images))]
    monkeypatch.setattr(kernels, "BLOCK_X", 16)
    monkeypatch.setattr(kernels, "MAX_NUMBERS", 3 * 21 * 30 * 4)
    ours = kernels.resize_boxes(images, boxes, flips, 21)
    assert torch.equal(ours, box_resize.resize_boxes(images, boxes, flips, 21))
