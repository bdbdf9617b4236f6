"""Image transforms: random crops and RandAugment to train on, centre crops to evaluate."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import ResizeKeepRatio
from torch import Generator, Tensor
from torch.utils.data import Dataset
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
)
from torchvision.transforms.functional import pil_to_tensor

from mae_et.config.data import DataConfig, resized_side
from mae_et.data.datasets import ImageDataset
from mae_et.data.device_copy import copy_to
from mae_et.data.images.boxes import PixelBox
from mae_et.errors import RunFailed, UserError
from mae_et.runtime.tensor_cache import cache_tensors

BICUBIC = InterpolationMode.BICUBIC
MAX_ASPECT = 16
"""Ratio of longer to shorter side beyond which the ends are trimmed before resizing."""


@contextlib.contextmanager
def seeded(seed: int, numpy: bool = True) -> Iterator[None]:
    """Seed the global generators that image transforms use, and restore them afterwards.

    `numpy` may be False without timm's RandAugment and mixing, which alone use numpy's generator:
    seeding it takes 70 microseconds.
    """
    saved = torch.default_generator.get_state(), random.getstate()
    saved_numpy = np.random.get_state() if numpy else None  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy:
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    try:
        yield
    finally:
        torch.default_generator.set_state(saved[0])
        random.setstate(saved[1])
        if saved_numpy is not None:
            np.random.set_state(saved_numpy)  # noqa: NPY002


class EvalDataset(Dataset[tuple[Tensor, int]]):
    """Centre crops with labels: resized to cover `size / eval_crop`, then cropped to `size`.

    In MAE's recipe, `data.eval_crop` is 0.875: 224 of 256.
    """

    def __init__(self, source: ImageDataset, config: DataConfig, size: int | tuple[int, int]):
        self.source = source
        sides = height, width = (size, size) if isinstance(size, int) else size
        covered = [resized_side(side, config.eval_crop) for side in sides]
        resize: Callable
        if height == width:
            resize = Resize(covered[0], BICUBIC, antialias=True)
        else:
            resize = ResizeKeepRatio(covered, interpolation="bicubic")
        self.transform = Compose([trim_ends, resize, CenterCrop(sides)])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return as_tensor(self.transform(image)), label


def flip_again(images: Tensor, which: Tensor, chance: float, generator: Generator) -> Tensor:
    """Flip the images [B C H W] marked in bool [B] once more, each with probability 1/2.

    Images may be on any device; marks and random numbers are on the CPU.

    If the flip probability is not 1/2, a second flip would change it: images are returned
    unchanged.
    """
    coins = torch.rand(len(images), generator=generator) < 0.5
    if chance != 0.5:
        return images
    chosen = copy_to(which & coins, images.device)
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def trim_ends(image: Image.Image | Tensor) -> Image.Image | Tensor:
    """Trim the ends of an image more than `MAX_ASPECT` times as long as it is wide.

    A centre crop does not contain them, and resizing a line of 20,000 pixels would take 4 GB.
    """
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.size[::-1]
    most = MAX_ASPECT * min(height, width)
    if max(height, width) <= most:
        return image
    return CenterCrop((min(height, most), min(width, most)))(image)


def as_tensor(image: Image.Image | Tensor) -> Tensor:
    """Convert a PIL image to uint8 [C H W]; return a tensor unchanged."""
    return image if isinstance(image, Tensor) else pil_to_tensor(image)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel.

    Args:
        images: [... C H W]; uint8 is scaled from [0, 255] to [0, 1], other types are not.
        mean: mean of each channel, or a sequence of one for all.
        std: standard deviation of each channel, likewise.

    Returns:
        float32 [... C H W].

    Raises:
        ValueError: mean and std have neither one number nor one per channel.
    """
    scaled = images / 255 if images.dtype == torch.uint8 else images.float()
    centre, spread = statistics(tuple(mean), tuple(std), images.shape[-3], images.device)
    return (scaled - centre) / spread


@cache_tensors(maxsize=8)
def statistics(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation as tensors [C 1 1] or [1 1 1], cached per device."""
    if len(mean) != len(std) or len(mean) not in {1, channels}:
        raise ValueError(
            f"mean and std must have one number, or one for each of {channels} channels, got "
            f"{len(mean)} and {len(std)}"
        )
    centre, spread = torch.tensor([mean, std], device=device)[..., None, None]
    return centre, spread


def _refuse_arrays(image: Image.Image | Tensor) -> Image.Image:
    if isinstance(image, Tensor):
        raise RunFailed("data.augment works on images, but the dataset holds arrays")
    return image


def training_transform(config: DataConfig, size: int, magnitude: float) -> Callable:
    """Return random-resized crop, flip and, with `data.augment`, RandAugment at a magnitude."""
    steps: list[Callable] = [
        RandomResizedCrop(size, config.scale, config.ratio, BICUBIC, antialias=True),
        RandomHorizontalFlip(config.flip),
    ]
    return Compose(steps + augmentation(config, magnitude))


def draw_resized_crop(config: DataConfig, height: int, width: int) -> tuple[PixelBox, bool]:
    """Draw the box and the flip of `training_transform`, from torch's global generator."""
    size = torch.empty(1, height, width, device="meta")
    box = RandomResizedCrop.get_params(size, list(config.scale), list(config.ratio))
    return box, bool(torch.rand(1) < config.flip)


def augmentation(config: DataConfig, magnitude: float) -> list[Callable]:
    """Return RandAugment at a magnitude, for PIL images; empty without `data.augment`."""
    if not config.augment:
        return []
    name, *rest = config.augment.split("-")
    mean = config.mean if len(config.mean) == 3 else config.mean * 3
    fill = tuple(round(255 * value) for value in mean)
    recipe = "-".join([name, f"m{magnitude:g}", *rest])
    try:
        how = {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        transform = rand_augment_transform(recipe, how)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"timm has no augmentation {recipe!r} (data.augment)") from error
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return [_refuse_arrays, transform]


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep some bits of each channel; 0 bits, at magnitude 10, give black.

    Pillow 13 refuses 0 bits, which timm still requests.
    """
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)
