"""Crops of JPEGs decoded no finer than their stage's bandwidth (`crop.method: decode`)."""

import torch
from torch import Generator, Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from mae_et.config.data import DataConfig
from mae_et.curriculum.schedule import Plan
from mae_et.data.datasets import ImageDataset
from mae_et.data.decoding import DecodedDataset
from mae_et.data.jpeg_crop import random_crop
from mae_et.data.transforms import augmentation, seeded
from mae_et.errors import RunFailed, UserError


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
