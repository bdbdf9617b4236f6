"""Datasets that augment training images with seeded random numbers.

Crop, flip, augmentation and mask noise are functions of (seed, epoch, sample): they do not depend
on the number of workers, on where a run was interrupted, or on how a global batch is spread over
ranks and micro-batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from mae_et.config.data import DataConfig
from mae_et.config.schema import Method, PretrainConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.batch import NOT_REPLACED, AnyBatch, Batch
from mae_et.data.datasets import ImageDataset
from mae_et.data.device_copy import copy_to
from mae_et.data.images.boxes import Box
from mae_et.data.images.decoding import DecodedDataset
from mae_et.data.images.jpeg_crop import crop_and_resize, draw_crop
from mae_et.data.sampler import SampleIndex, sample_seed
from mae_et.data.transforms import (
    as_tensor,
    augmentation,
    draw_resized_crop,
    flip_again,
    seeded,
    training_transform,
)
from mae_et.errors import UserError, require


class AugmentedDataset(Dataset[AnyBatch], ABC):
    """Images augmented for their stage, indexed by `SampleIndex`.

    With crop method `decode`, crops are decoded at the stage's bandwidth; `transforms` has a
    transform for each stage, for the other methods.
    """

    def __init__(
        self,
        source: ImageDataset,
        config: DataConfig,
        plan: Plan,
        seed: int,
        method: Method,
        transforms: Sequence[Callable],
    ):
        self.source, self.config, self.seed, self.transforms = source, config, seed, transforms
        self.decodes_crops = method == "decode"
        if self.decodes_crops:
            if not isinstance(source, DecodedDataset):
                raise UserError("crop.method decode needs a dataset of image files")
            self.crop_sizes = [stage.bandwidth for stage in plan.stages]
            stages = (augmentation(config, stage.magnitude) for stage in plan.stages)
            self.augmentations = list(map(Compose, stages))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SampleIndex) -> AnyBatch:
        return self.augment(index, index.sample)

    def augment(self, index: SampleIndex, sample: int) -> AnyBatch:
        """Augment image `sample` with the random numbers of `index`, maybe another image's."""
        seed = sample_seed(self.seed, index.epoch, index.sample)
        if self.decodes_crops:
            generator = torch.Generator().manual_seed(seed)
            view, label = self._decode_crop(sample, index.stage, generator)
            with seeded(seed, numpy=False):  # RandAugment is done
                return self.finish(view, label, index.stage, generator)
        image, label = self.source[sample]
        with seeded(seed, numpy=self.config.augment is not None):
            view = as_tensor(self.transforms[index.stage](image))
            return self.finish(view, label, index.stage)

    def _decode_crop(self, sample: int, stage: int, generator: Generator) -> tuple[Tensor, int]:
        """Return a crop [C B B], uint8 (float32 for arrays that are not uint8), and its label."""
        source: Any = self.source
        size = self.crop_sizes[stage]
        sample_box, flip = draw_crop(self.config, generator)
        with source.naming_errors(sample):
            content, label, sample_box = source.read_for_crop(sample, sample_box, size)
            crop = crop_and_resize(content, source.channels, sample_box, size, source.max_value)
        crop = crop.flip(-1) if flip else crop
        if self.config.augment:
            with seeded(int(torch.randint(2**62, (), generator=generator))):
                image = to_pil_image(crop) if crop.dtype == torch.uint8 else crop  # refused
                crop = pil_to_tensor(self.augmentations[stage](image))
        return crop, label

    @abstractmethod
    def finish(
        self, view: Tensor, label: int, stage: int, generator: Generator | None = None
    ) -> AnyBatch:
        """Return the sample of a view, uint8 [C H W], for the loader to stack.

        Random numbers come from `generator`, or from the global generator, which is seeded.
        """

    def refresh(self, batch: AnyBatch, reused: Tensor, seed: int) -> AnyBatch:
        """Redraw the random numbers of the reused images, marked in bool [B]."""
        generator = torch.Generator().manual_seed(seed)
        batch = self.redraw(batch, reused, generator)
        images = flip_again(batch.images, reused, self.config.flip, generator)
        replaced = torch.where(reused[:, None], NOT_REPLACED, batch.replaced)
        return batch._replace(images=images, replaced=replaced)

    def redraw(self, batch: AnyBatch, reused: Tensor, generator: Generator) -> AnyBatch:
        """Redraw further random numbers of the reused images; none by default."""
        return batch


class TrainTransform:
    """Transform of a training image; see `train_transform`."""

    def __init__(self, plan: Plan, patch: int, seed: int, config: DataConfig):
        require(
            patch > 0 and all(bandwidth % patch == 0 for bandwidth in plan.bandwidths),
            f"patch_size {patch} does not divide the bandwidths {plan.bandwidths}",
        )
        self.seed, self.config = seed, config
        self.patches = [(stage.bandwidth // patch) ** 2 for stage in plan.stages]
        self.transforms = [
            training_transform(config, plan.base, stage.magnitude) for stage in plan.stages
        ]

    def __call__(self, image: Image.Image | Tensor, index: SampleIndex) -> Batch:
        """Return one image with its mask noise; the default collate function makes batches."""
        seed = sample_seed(self.seed, index.epoch, index.sample)
        with seeded(seed, numpy=self.config.augment is not None):
            return self.with_noise(as_tensor(self.transforms[index.stage](image)), index.stage)

    def with_noise(self, view: Tensor, stage: int, generator: Generator | None = None) -> Batch:
        """Return a view with its mask noise, drawn from a generator or from the global one."""
        noise = torch.rand(self.patches[stage], generator=generator)
        return Batch(view, noise, torch.tensor(stage))


def train_transform(
    plan: Plan, patch_size: int = 16, seed: int = 0, config: DataConfig | None = None
) -> TrainTransform:
    """Return the transform of `mae-et pretrain`, for the dataset of a custom training loop.

    Random-resized crop to the base size, flip, RandAugment at the stage's magnitude if configured,
    and the noise of the mask, all functions of (seed, epoch, sample). The reduction to the stage's
    bandwidth follows on the device (`mae_et.low_frequency_crop`).

    Args:
        plan: plan of the `CurriculumBatchSampler`.
        patch_size: side of a patch in pixels.
        seed: seed of crops, flips, augmentation and masks.
        config: `scale`, `ratio`, `flip`, `augment` and `mean` are read; MAE's by default.

    Returns:
        A function of (image, index), a PIL image (`convert("RGB")` it: a palette has one channel)
        or a tensor [C H W] and its `SampleIndex`, that returns a `Batch` of one: `images` uint8
        [C base base], `noise` float32 [N] with N = (bandwidth / patch_size)^2, `stage` int64 [].
        DataLoader stacks them along a new dimension.

    Raises:
        UserError: timm does not know the augmentation, or a bandwidth is not a multiple of the
            patch.
    """
    return TrainTransform(plan, patch_size, seed, config or DataConfig())


class TrainDataset(AugmentedDataset[Batch]):
    """Random-resized crop and flip as in MAE, RandAugment at the stage's magnitude, mask noise."""

    def __init__(
        self,
        source: ImageDataset,
        config: DataConfig,
        plan: Plan,
        patch: int,
        seed: int,
        method: Method = "fourier",
    ):
        self.transform = TrainTransform(plan, patch, seed, config)
        super().__init__(source, config, plan, seed, method, self.transform.transforms)
        self.sides = [s.bandwidth if method == "decode" else plan.base for s in plan.stages]
        """Side of the images of each stage, in pixels."""

    @classmethod
    def from_config(
        cls, config: PretrainConfig, source: ImageDataset, plan: Plan
    ) -> "TrainDataset":
        """Return the training images of a run."""
        return cls(source, config.data, plan, config.model.patch, config.seed, config.crop.method)

    def finish(
        self, view: Tensor, label: int, stage: int, generator: Generator | None = None
    ) -> Batch:
        """Return a view with its mask noise."""
        return self.transform.with_noise(view, stage, generator)

    def draw_view(self, index: SampleIndex, height: int, width: int) -> tuple[Box, bool, Tensor]:
        """Return the box that `augment` crops from an image of this size, the flip and the noise.

        As drawn without RandAugment, which draws numbers between the flip and the noise.
        """
        seed = sample_seed(self.seed, index.epoch, index.sample)
        patches = self.transform.patches[index.stage]
        if self.decodes_crops:
            generator = Generator().manual_seed(seed)
            sample_box, flip = draw_crop(self.config, generator)
            return sample_box(height, width), flip, torch.rand(patches, generator=generator)
        with seeded(seed, numpy=False):
            box, flip = draw_resized_crop(self.config, height, width)
            return Box(*box), flip, torch.rand(patches)

    def redraw(self, batch: Batch, reused: Tensor, generator: Generator) -> Batch:
        """Return the batch with new masks for the reused images."""
        noise = copy_to(torch.rand(batch.noise.shape, generator=generator), batch.noise.device)
        marked = copy_to(reused[:, None], batch.noise.device)
        return batch._replace(noise=torch.where(marked, noise, batch.noise))
