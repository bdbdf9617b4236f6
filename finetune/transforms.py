"""Random views of labelled images, and what is done to whole micro-batches of them."""

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
from mae_et.config.schema import DataConfig
from mae_et.curriculum.frequency import Method
from mae_et.curriculum.schedule import Plan
from mae_et.data.datasets import ImageDataset
from mae_et.data.sampler import SampleIndex, sample_seed
from mae_et.data.transforms import (
    AS_DRAWN,
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
    """float32 [B C H W], normalised: at the base size, or with crop.method decode at the stage's
    bandwidth."""
    labels: Tensor
    """int64 [B]."""
    unread: Tensor = AS_DRAWN
    """int64 [B 3]: see `mae_et.data.transforms.Batch`."""


class LabelledTrainDataset(Dataset[LabelledBatch]):
    """Random-resized crop, flip, RandAugment at the stage's magnitude, random erasing."""

    def __init__(
        self,
        source: ImageDataset,
        data: DataConfig,
        recipe: RecipeConfig,
        plan: Plan,
        seed: int,
        size: Size | None = None,
        method: Method = "resize",
    ):
        self.crops = DecodedCrops(source, data, plan) if method == "decode" else None
        self.source, self.data, self.seed = source, data, seed
        full: Any = size or plan.base  # of what crops to rectangles too
        self.transforms = [training_transform(data, full, stage.magnitude) for stage in plan.stages]
        self.erase = RandomErasing(recipe.erasing, mode="pixel", device="cpu")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draw: SampleIndex) -> LabelledBatch:
        return self.shown(draw, draw.sample)

    def shown(self, draw: SampleIndex, sample: int) -> LabelledBatch:
        """Return a view of an image as a draw says: of its own image, or of another one.

        Raises:
            Unreadable: the image cannot be read.
        """
        seed = sample_seed(self.seed, draw.epoch, draw.sample)
        if self.crops is not None:
            generator = torch.Generator().manual_seed(seed)
            view, label = self.crops.load(sample, draw.stage, generator)
            with seeded(seed):
                return self._erased(view, label)
        image, label = self.source[sample]
        with seeded(seed):
            return self._erased(as_tensor(self.transforms[draw.stage](image)), label)

    def _erased(self, view: Tensor, label: int) -> LabelledBatch:
        """Normalise a view first, for the noise that fills what is erased is of unit variance."""
        pixels = normalise(view[None], self.data.mean, self.data.std)[0]
        return LabelledBatch(self.erase(pixels), torch.tensor(label))

    def renewed(self, batch: LabelledBatch, again: Tensor, seed: int) -> LabelledBatch:
        """Return a batch in which images that are used again are flipped anew."""
        generator = torch.Generator().manual_seed(seed)
        images = flip_again(batch.images, again, self.data.flip, generator)
        unread = torch.where(again[:, None], AS_DRAWN, batch.unread)
        return LabelledBatch(images, batch.labels, unread)


def eval_dataset(source: ImageDataset, data: DataConfig, size: Size) -> EvalDataset:
    """Return central views with labels: resized to cover the size and its border, then cropped.

    Args:
        source: labelled images.
        data: says how much is border (`eval_crop`).
        size: of the views, in pixels.
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
    batch: LabelledBatch, recipe: RecipeConfig, classes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Mix the images of a micro-batch with each other, by mixup or cutmix.

    Args:
        batch: on its device; an even number of images where anything is mixed.
        recipe: what is done.
        classes: number of classes.
        seed: of this micro-batch.

    Returns:
        Images, and labels as probabilities [B classes], smoothed.
    """
    if not (recipe.mixup or recipe.cutmix):
        off = recipe.smoothing / classes
        hot = torch.full((len(batch.labels), classes), off, device=batch.labels.device)
        return batch.images, hot.scatter_(1, batch.labels[:, None], 1 - recipe.smoothing + off)
    mixup = Mixup(
        recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes
    )
    with seeded(seed):
        return mixup(batch.images, batch.labels)
