"""Augment images for training, with seeded random numbers, and crop their centres for evaluation.

Crop, flip, augmentation and mask noise are functions of (seed, epoch, sample): they depend neither
on the number of workers, nor on where a run was interrupted, nor on how a global batch is spread
over ranks and micro-batches.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
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
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from mae_et.config.data import DataConfig
from mae_et.curriculum.frequency import Method
from mae_et.curriculum.schedule import Plan
from mae_et.data.box_resize import PixelBox
from mae_et.data.datasets import ImageDataset
from mae_et.data.decoding import Box, DecodedDataset
from mae_et.data.jpeg_crop import draw_crop, random_crop
from mae_et.data.sampler import SampleIndex, sample_seed
from mae_et.errors import RunFailed, UserError

BICUBIC = InterpolationMode.BICUBIC
NOT_REPLACED = torch.tensor((-1, -1, -1))
MAX_ASPECT = 16
"""Longer side over shorter side beyond which the ends are trimmed before an image is resized."""


class Batch(NamedTuple):
    """A micro-batch on its way to the device."""

    images: Tensor
    """uint8 [B C H W] (float32 where the files are): at the base size, or with crop.method decode
    at the stage's bandwidth."""
    noise: Tensor
    """float32 [B N]: the mask's noise, on the stage's grid."""
    stage: Tensor
    """int64 [B]: index of the plan's stage, the same for every image of a micro-batch."""
    replaced: Tensor = NOT_REPLACED
    """int64 [B 3]: the sample index whose image could not be read and was replaced; -1 if none."""


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that image transforms use, and restore them afterwards."""
    saved = torch.default_generator.get_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  (timm's RandAugment uses it)
    try:
        yield
    finally:
        torch.default_generator.set_state(saved[0])
        random.setstate(saved[1])
        np.random.set_state(saved[2])  # noqa: NPY002


class TrainTransform:
    """Transform of a training image; see `train_transform`."""

    def __init__(self, plan: Plan, patch: int, seed: int, config: DataConfig):
        self.seed = seed
        self.patches = [(stage.bandwidth // patch) ** 2 for stage in plan.stages]
        self.transforms = [
            training_transform(config, plan.base, stage.magnitude) for stage in plan.stages
        ]

    def __call__(self, image: Image.Image | Tensor, index: SampleIndex) -> Batch:
        """Return one image with its mask noise; the default collate function makes batches."""
        with seeded(sample_seed(self.seed, index.epoch, index.sample)):
            view = self.transforms[index.stage](image)
            noise = torch.rand(self.patches[index.stage])
        return Batch(as_tensor(view), noise, torch.tensor(index.stage))


def train_transform(
    plan: Plan, patch_size: int = 16, seed: int = 0, config: DataConfig | None = None
) -> TrainTransform:
    """Return the transform of `mae-et pretrain`, for the dataset of a training loop of one's own.

    Random-resized crop to the base size, flip, RandAugment at the stage's magnitude if `config` has
    it, and the noise of the mask. All of it is a function of (seed, epoch, sample). The reduction
    to the stage's bandwidth follows on the device (`mae_et.low_frequency_crop`).

    Args:
        plan: the plan of the `CurriculumBatchSampler`.
        patch_size: side of a patch in pixels.
        seed: seed of crops, flips, augmentation and masks.
        config: `scale`, `ratio`, `flip`, `augment` and `mean` are read; MAE's by default.

    Returns:
        A function of (image, index), a PIL image or a tensor [C H W] and its `SampleIndex`, that
        returns a `Batch` of one: `images` uint8 [C base base], `noise` float32 [N] with N =
        (bandwidth / patch_size)^2, `stage` int64 []. DataLoader stacks them along a new dimension.

    Raises:
        UserError: timm does not know the augmentation.
    """
    return TrainTransform(plan, patch_size, seed, config or DataConfig())


class TrainDataset(Dataset[Batch]):
    """Random-resized crop and flip as in MAE, and RandAugment at the stage's magnitude.

    Args:
        source: the images.
        config: parameters of the crop, the flip and the augmentation.
        plan: base size, and bandwidth and magnitude of each stage.
        patch: patch size in pixels, for the mask noise.
        seed: seed of all random numbers.
        method: with decode, crops have the stage's bandwidth, else the base size.

    Raises:
        UserError: timm does not know the augmentation, or the dataset cannot decode crops.
    """

    def __init__(
        self,
        source: ImageDataset,
        config: DataConfig,
        plan: Plan,
        patch: int,
        seed: int,
        method: Method = "fourier",
    ):
        self.source, self.config, self.seed = source, config, seed
        self.flip = config.flip
        self.sides = [s.bandwidth if method == "decode" else plan.base for s in plan.stages]
        """Side of the images of each stage, in pixels."""
        self.crops = DecodedCrops(source, config, plan) if method == "decode" else None
        self.transform = TrainTransform(plan, patch, seed, config)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SampleIndex) -> Batch:
        return self.augment(index, index.sample)

    def augment(self, index: SampleIndex, sample: int) -> Batch:
        """Augment image `sample` with the random numbers of `index`, its own or another image's.

        Raises:
            Unreadable: the image cannot be read.
        """
        seed = sample_seed(self.seed, index.epoch, index.sample)
        if self.crops is not None:
            generator = torch.Generator().manual_seed(seed)
            crop, _ = self.crops.load(sample, index.stage, generator)
            noise = torch.rand(self.transform.patches[index.stage], generator=generator)
            return Batch(crop, noise, torch.tensor(index.stage))
        image, _ = self.source[sample]
        return self.transform(image, index)

    def draw_box(self, index: SampleIndex, height: int, width: int) -> tuple[Box, bool]:
        """Return the box that `augment` takes of an image of a size, and whether it is flipped."""
        seed = sample_seed(self.seed, index.epoch, index.sample)
        if self.crops is not None:
            sample_box, flip = draw_crop(self.config, Generator().manual_seed(seed))
            return sample_box(height, width), flip
        with seeded(seed):
            box, flip = draw_resized_crop(self.config, height, width)
        return Box(*box), flip

    def refresh(self, batch: Batch, reused: Tensor, seed: int) -> Batch:
        """Return the batch with new masks and flips for the reused images, marked in bool [B]."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(batch.noise.shape, generator=generator)
        images = flip_again(batch.images, reused, self.flip, generator)
        noise = torch.where(reused[:, None], noise, batch.noise)
        replaced = torch.where(reused[:, None], NOT_REPLACED, batch.replaced)
        return Batch(images, noise, batch.stage, replaced)


class DecodedCrops:
    """Random crops decoded at the stage's bandwidth, then RandAugment."""

    def __init__(self, source: ImageDataset, config: DataConfig, plan: Plan):
        if not isinstance(source, DecodedDataset):
            raise UserError("crop.method decode needs a dataset of image files")
        self.source, self.config = source, config
        self.sizes = [stage.bandwidth for stage in plan.stages]
        self.augment = [
            Compose(augmentation(config, stage.magnitude)) if config.augment else None
            for stage in plan.stages
        ]

    def load(self, sample: int, stage: int, generator: Generator) -> tuple[Tensor, int]:
        """Return a crop [C B B] and its label; the generator's state determines the crop.

        Raises:
            Unreadable: the image cannot be read.
        """
        crop, label = random_crop(self.source, sample, self.config, self.sizes[stage], generator)
        augment = self.augment[stage]
        if augment is not None:
            if crop.dtype != torch.uint8:
                raise RunFailed("data.augment works on images, but the dataset holds arrays")
            with seeded(int(torch.randint(2**62, (), generator=generator))):
                crop = pil_to_tensor(augment(to_pil_image(crop)))
        return crop, label


class EvalDataset(Dataset[tuple[Tensor, int]]):
    """Resize, then crop the centre, with labels (256 to 224 in MAE's recipe)."""

    def __init__(self, source: ImageDataset, config: DataConfig, size: int):
        self.source = source
        self.transform = Compose(
            [
                trim_ends,
                Resize(round(size / config.eval_crop), BICUBIC, antialias=True),
                CenterCrop(size),
            ]
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return as_tensor(self.transform(image)), label


def flip_again(images: Tensor, which: Tensor, chance: float, generator: Generator) -> Tensor:
    """Flip the marked images [B] of [B C H W] once more, each with probability a half.

    With a flip probability other than a half, a second flip would change it: the images are
    returned unchanged.
    """
    coins = torch.rand(len(images), generator=generator) < 0.5
    if chance != 0.5:
        return images
    return torch.where((which & coins)[:, None, None, None], images.flip(-1), images)


def trim_ends(image: Image.Image | Tensor) -> Image.Image | Tensor:
    """Trim the ends of an image that is more than `MAX_ASPECT` times as long as it is wide.

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


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel.

    Args:
        images: [B C H W]; uint8 is scaled from [0, 255] to [0, 1], other types are not.
        mean: of each channel, or one number.
        std: of each channel, or one number.

    Returns:
        float32 [B C H W].
    """
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    centre, spread = statistics(mean, std, images.device)
    return (images.float() / scale - centre) / spread


@lru_cache(maxsize=8)
def statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation as tensors [C 1 1], cached on the device."""
    centre, spread = torch.tensor([mean, std], device=device)[..., None, None]
    return centre, spread


def _refuse_arrays(image: Image.Image | Tensor) -> Image.Image:
    if isinstance(image, Tensor):
        raise RunFailed("data.augment works on images, but the dataset holds arrays")
    return image


def training_transform(config: DataConfig, size: int, magnitude: float) -> Callable:
    """Return random-resized crop, flip and, with `data.augment`, RandAugment at a magnitude.

    Raises:
        UserError: timm knows no such augmentation.
    """
    steps: list[Callable] = [
        RandomResizedCrop(size, config.scale, config.ratio, BICUBIC, antialias=True),
        RandomHorizontalFlip(config.flip),
    ]
    return Compose(steps + augmentation(config, magnitude))


def draw_resized_crop(config: DataConfig, height: int, width: int) -> tuple[PixelBox, bool]:
    """Draw the box and the flip of `training_transform`, from torch's global generator.

    Args:
        config: scale and ratio of the box, and the probability of a flip.
        height: height of the image in pixels.
        width: width of the image in pixels.
    """
    size = torch.empty(1, height, width, device="meta")
    box = RandomResizedCrop.get_params(size, list(config.scale), list(config.ratio))
    return box, bool(torch.rand(1) < config.flip)


def augmentation(config: DataConfig, magnitude: float) -> list[Callable]:
    """Return RandAugment at a magnitude, as transforms of PIL images; none without `data.augment`.

    Raises:
        UserError: timm knows no such augmentation.
    """
    if not config.augment:
        return []
    name, *rest = config.augment.split("-")
    fill = tuple(round(255 * mean) for mean in config.mean)
    recipe = "-".join([name, f"m{magnitude:g}", *rest])
    try:
        how = {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        return [_refuse_arrays, rand_augment_transform(recipe, how)]
    except (AssertionError, ValueError, KeyError):
        raise UserError(f"timm knows no augmentation {recipe!r} (data.augment)") from None
