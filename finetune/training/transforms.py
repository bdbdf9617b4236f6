"""Augmentation of labelled images, and mixing of whole micro-batches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Generator, Tensor

from finetune.config import RecipeConfig
from finetune.image_size import Size
from mae_et.config.data import DataConfig
from mae_et.config.schema import Method
from mae_et.curriculum.frequency import low_frequency_crop
from mae_et.curriculum.plan import Plan
from mae_et.data.batch import NOT_REPLACED
from mae_et.data.datasets import ImageDataset
from mae_et.data.train_dataset import AugmentedDataset
from mae_et.data.transforms import normalise, seeded, training_transform


class LabelledBatch(NamedTuple):
    """A micro-batch of labelled images."""

    images: Tensor
    """float32 [B C H W], normalised, at the stage's bandwidth."""
    labels: Tensor
    """int64 [B]."""
    stage: Tensor
    """int64 [B]: index of the plan's stage, the same for every image of a micro-batch."""
    replaced: Tensor = NOT_REPLACED
    """int64 [B 3]: see `mae_et.data.batch.Batch`."""


class LabelledTrainDataset(AugmentedDataset[LabelledBatch]):
    """Random-resized crop, flip, RandAugment, reduction to the bandwidth, random erasing.

    The reduction comes before the erasing, as in EfficientTrain++'s released code: noise reduced
    with the image would lose up to two thirds of its standard deviation. It runs in the loader, so
    batches of small stages are small.

    The base size is by default the plan's. `sizes` are height and width at each stage; by default
    squares of the bandwidth's side.
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
        full: Any = size or plan.base
        transforms = [training_transform(data, full, stage.magnitude) for stage in plan.stages]
        super().__init__(source, data, plan, seed, method, transforms)
        self.method = method
        self.sizes = sizes or [(stage.bandwidth, stage.bandwidth) for stage in plan.stages]
        self.erase = RandomErasing(recipe.erasing, mode="pixel", device="cpu")

    def finish(
        self, view: Tensor, label: int, stage: int, generator: Generator | None = None
    ) -> LabelledBatch:
        """Reduce to the bandwidth, normalise, and erase with noise of unit variance."""
        pixels = low_frequency_crop(view, self.sizes[stage], self.method)
        pixels = normalise(pixels, self.config.mean, self.config.std)
        return LabelledBatch(self.erase(pixels), torch.tensor(label), torch.tensor(stage))


def mix(
    images: Tensor, labels: Tensor, recipe: RecipeConfig, classes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Mix the images of a micro-batch by mixup or CutMix, and smooth their labels.

    Images are float32 [B C H W], B even if they are mixed; labels are int64 [B], and returned as
    probabilities, float [B classes]. `seed` is that of this micro-batch.
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
