"""Crops of JPEGs decoded no finer than their stage's bandwidth needs (`crop.method: decode`)."""

import torch
from torch import Generator, Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from mae_et.config.data import DataConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.datasets import ImageDataset
from mae_et.data.decoding import DecodedDataset
from mae_et.data.jpeg_crop import crop_and_resize, draw_crop
from mae_et.data.transforms import augmentation, seeded
from mae_et.errors import RunFailed, UserError


class DecodedCrops:
    """Random crops decoded at the stage's bandwidth, then RandAugment."""

    def __init__(self, source: ImageDataset, config: DataConfig, plan: Plan):
        if not isinstance(source, DecodedDataset):
            raise UserError("crop.method decode needs a dataset of image files")
        self.source, self.config = source, config
        self.sizes = [stage.bandwidth for stage in plan.stages]
        self.augment = [Compose(augmentation(config, stage.magnitude)) for stage in plan.stages]

    def load(self, sample: int, stage: int, generator: Generator) -> tuple[Tensor, int]:
        """Return a crop [C B B], uint8 (float32 for arrays that are not uint8), and its label."""
        source, size = self.source, self.sizes[stage]
        sample_box, flip = draw_crop(self.config, generator)
        with source.naming_errors(sample):
            content, label, sample_box = source.read_for_crop(sample, sample_box, size)
            crop = crop_and_resize(content, source.channels, sample_box, size, source.max_value)
        crop = crop.flip(-1) if flip else crop
        if self.config.augment:
            if crop.dtype != torch.uint8:
                raise RunFailed("data.augment works on images, but the dataset holds arrays")
            with seeded(int(torch.randint(2**62, (), generator=generator))):
                crop = pil_to_tensor(self.augment[stage](to_pil_image(crop)))
        return crop, label
