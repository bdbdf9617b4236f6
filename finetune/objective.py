"""How good a frozen encoder is on training images whose labels are held out.

A choice that is made by it leaves the validation split for what is reported.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from finetune.datasets import open_labelled
from finetune.features import Features, extract_dataset_features
from finetune.linear_classifier import probe_features
from finetune.nearest_neighbours import knn_accuracy
from finetune.scoring_config import ProbeConfig
from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.load import masked_autoencoder
from mae_et.config.schema import DataConfig
from mae_et.data.datasets import open_dataset
from mae_et.data.sampler import sample_seed
from mae_et.errors import UserError
from mae_et.runtime import distributed


@dataclass(frozen=True)
class HeldOutAccuracy:
    """Accuracy, in percent, on a share of the labelled training images that the rest votes on."""

    by: Literal["knn", "linear"] = "knn"
    share: float = 0.1
    """Held out, of the images that are looked at."""
    images: int | None = None
    """Training images that are looked at; all when not given."""
    seed: int = 0
    """Of what is looked at, what is held out, and of the probe."""
    num_workers: int | None = None
    """Loader processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def check(self, data: DataConfig, channels: int) -> None:
        """Refuse data on which there is nothing to measure.

        Raises:
            UserError: images have no labels, or are too few.
        """
        source = open_labelled(data, "train", channels, f"an accuracy of {self.by}")
        first, second = self.split(len(source))
        if not first or not second:
            raise UserError(
                f"{len(source)} training images are too few to hold {self.share:g} of them out"
            )

    def split(self, images: int) -> tuple[list[int], list[int]]:
        """Return the images that vote, and those that are held out, of so many."""
        generator = torch.Generator().manual_seed(sample_seed(self.seed, images))
        order = torch.randperm(images, generator=generator)[: self.images].tolist()
        held_out = round(self.share * len(order))
        return sorted(order[held_out:]), sorted(order[:held_out])

    def __call__(self, folder: Path) -> float:
        """Return the accuracy of a run folder's encoder.

        Raises:
            UserError: the run or its data cannot be used.
        """
        weights = load_weights(folder)
        run = weights.config
        if run is None:
            raise UserError(f"{folder} is no run folder of mae-et pretrain")
        model = masked_autoencoder(weights)
        device = distributed.choose_device(self.device)
        config = ProbeConfig(
            folder, num_workers=self.num_workers, device=self.device, seed=self.seed
        )
        votes, judged = self.split(len(open_dataset(run.data, "train", model.channels)))
        found = extract_dataset_features(
            model, run.data, config, "train", device, [*votes, *judged]
        )
        vectors, labels = (tensor.to(device) for tensor in (found.vectors, found.labels))
        count = len(votes)
        train = Features(vectors[:count], labels[:count], found.classes)
        val = Features(vectors[count:], labels[count:], found.classes)
        if self.by == "knn":
            return knn_accuracy(train, val, config.neighbours, config.temperature)
        return probe_features(train, val, config.epochs, self.seed).accuracy
