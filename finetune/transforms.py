"""Augmentation of labelled images, and mixing of whole micro-batches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import CenterCrop, Compose

from finetune.config import RecipeConfig
from finetune.image_size import Size, height_and_width
from mae_et.config.data import DataConfig
from mae_et.curriculum.frequency import Method, low_frequency_crop
from mae_et.curriculum.schedule import Plan
from mae_et.data.datasets import ImageDataset
from mae_et.data.sampler import SampleIndex, sample_seed
from mae_et.data.transforms import (
    NOT_REPLACED,
    DecodedCrops,
    EvalDataset,
    as_tensor,
    flip_again,
    normalise,
    seeded,
    training_transform,
    trim_ends,
)


class LabelledBatch(NamedTuple):
    """A micro-batch of labelled images."""

    images: Tensor
    """float32 [B C H W], normalised, at the stage's bandwidth."""
    labels: Tensor
    """int64 [B]."""
    stage: Tensor
    """int64 [B]: index of the plan's stage, the same for every image of a micro-batch."""
    replaced: Tensor = NOT_REPLACED
    """int64 [B 3]: see `mae_et.data.transforms.Batch`."""


class LabelledTrainDataset(Dataset[LabelledBatch]):
    """Random-resized crop, flip, RandAugment, reduction to the bandwidth, random erasing.

    The reduction comes before the erasing, as in EfficientTrain++'s released code: noise that is
    reduced with the image would lose up to two thirds of its deviation. It runs in the loader,
    which also makes the batches of small stages small.

    Args:
        source: labelled images.
        data: crop, flip, RandAugment and statistics.
        recipe: probability of erasing.
        plan: stages, with their bandwidths and magnitudes.
        seed: seed of all augmentation.
        size: base size; by default the plan's.
        method: reduction to the bandwidth.
        sizes: height and width at each stage; by default the bandwidth squared.
    """

    def __init__(
        self,
        source: ImageDataset,
        data: DataConfig,
        recipe: RecipeConfig,
        plan: Plan,
        seed: int,
        size: Size | None = None,
        method: Method = "resize",
        sizes: Sequence[tuple[int, int]] | None = None,
    ):
        self.crops = DecodedCrops(source, data, plan) if method == "decode" else None
        self.source, self.data, self.seed, self.method = source, data, seed, method
        self.sizes = sizes or [(stage.bandwidth, stage.bandwidth) for stage in plan.stages]
        full: Any = size or plan.base
        self.transforms = [training_transform(data, full, stage.magnitude) for stage in plan.stages]
        self.erase = RandomErasing(recipe.erasing, mode="pixel", device="cpu")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SampleIndex) -> LabelledBatch:
        return self.augment(index, index.sample)

    def augment(self, index: SampleIndex, sample: int) -> LabelledBatch:
        """Augment image `sample` with the random numbers of `index`, its own or another image's.

        Raises:
            Unreadable: the image cannot be read.
        """
        seed = sample_seed(self.seed, index.epoch, index.sample)
        if self.crops is not None:
            generator = torch.Generator().manual_seed(seed)
            view, label = self.crops.load(sample, index.stage, generator)
            with seeded(seed):
                return self._finish(view, label, index.stage)
        image, label = self.source[sample]
        with seeded(seed):
            return self._finish(as_tensor(self.transforms[index.stage](image)), label, index.stage)

    def _finish(self, view: Tensor, label: int, stage: int) -> LabelledBatch:
        """Normalise, reduce to the bandwidth, and erase: the noise is of unit variance then."""
        pixels = normalise(view[None], self.data.mean, self.data.std)[0]
        pixels = low_frequency_crop(pixels, self.sizes[stage], self.method)
        return LabelledBatch(self.erase(pixels), torch.tensor(label), torch.tensor(stage))

    def refresh(self, batch: LabelledBatch, reused: Tensor, seed: int) -> LabelledBatch:
        """Return the batch with a new random flip of the reused images, marked in bool [B]."""
        generator = torch.Generator().manual_seed(seed)
        images = flip_again(batch.images, reused, self.data.flip, generator)
        replaced = torch.where(reused[:, None], NOT_REPLACED, batch.replaced)
        return LabelledBatch(images, batch.labels, batch.stage, replaced)


def eval_dataset(source: ImageDataset, data: DataConfig, size: Size) -> EvalDataset:
    """Return centre crops with labels: resized to cover `size / data.eval_crop`, then cropped.

    Args:
        source: labelled images.
        data: `eval_crop`, the share of the resized side that the crop keeps.
        size: side of the crops in pixels, or (height, width).
    """
    height, width = sides = height_and_width(size)
    view = EvalDataset(source, data, min(sides))
    if height != width:
        whole = [round(side / data.eval_crop) for side in sides]
        view.transform = Compose(
            [
                trim_ends,
                ResizeKeepRatio(whole, interpolation="bicubic"),
                CenterCrop(sides),
            ]
        )
    return view


def mix(
    images: Tensor, labels: Tensor, recipe: RecipeConfig, classes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Mix the images of a micro-batch by mixup or CutMix, and smooth their labels.

    Args:
        images: float32 [B C H W]; B must be even if images are mixed.
        labels: int64 [B].
        recipe: mixup, CutMix and label smoothing.
        classes: number of classes.
        seed: seed of this micro-batch.

    Returns:
        Images [B C H W], and labels as probabilities, float [B classes].
    """
    if not (recipe.mixup or recipe.cutmix):
        off = recipe.smoothing / classes
        hot = torch.full((len(labels), classes), off, device=labels.device)
        return images, hot.scatter_(1, labels[:, None], 1 - recipe.smoothing + off)
    mixup = Mixup(
        recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes
    )
    with seeded(seed):
        return mixup(images, labels)
