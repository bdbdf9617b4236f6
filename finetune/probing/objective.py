"""Accuracy of a frozen encoder on held-out training images: the objective of a search.

The validation split stays untouched for reporting.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from finetune.datasets import open_labelled
from finetune.probing.features import Features, extract_dataset_features
from finetune.probing.frozen_encoder import frozen_encoder_from_weights
from finetune.probing.linear_classifier import probe_features
from finetune.scoring_config import ProbeConfig
from mae_et.checkpoints.formats import load_weights
from mae_et.config.data import DataConfig
from mae_et.config.efficiency import Device
from mae_et.config.typed import typed
from mae_et.data.datasets import open_dataset
from mae_et.data.sampler import sample_seed
from mae_et.errors import UserError, require_in
from mae_et.probing.nearest_neighbours import knn_accuracy
from mae_et.runtime import distributed


@dataclass(frozen=True)
class HeldOutAccuracy:
    """Top-1 in percent on held-out labelled training images, by a probe trained on the others."""

    by: Literal["knn", "linear"] = "knn"
    """kNN, or a linear probe."""
    share: float = 0.1
    """Share of the images to hold out."""
    images: int | None = None
    """Training images to use, drawn at random; all by default."""
    seed: int = 0
    """Seed of the draw, the held-out split and the probe."""
    num_workers: int | None = None
    """Loader processes; by default one per core, or per four cores on the CPU, at most 16."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""

    def __post_init__(self) -> None:
        require_in("(0, 1)", self, "share")
        require_in("(0, inf)", self, "images")
        require_in("[0, inf)", self, "num_workers")
        typed(self, HeldOutAccuracy)

    def check(self, data: DataConfig, channels: int) -> None:
        """Raise `UserError` if images have no labels, or are too few."""
        source = open_labelled(data, "train", channels, f"an accuracy of {self.by}")
        rest, held_out = self.split(len(source))
        if not rest or not held_out:
            raise UserError(
                f"{len(source)} training images are too few to hold out a share of {self.share:g}"
            )

    def split(self, count: int) -> tuple[list[int], list[int]]:
        """Return the training and held-out indices of `count` images, each in ascending order."""
        generator = torch.Generator().manual_seed(sample_seed(self.seed, count))
        order = torch.randperm(count, generator=generator)[: self.images].tolist()
        held_out = round(self.share * len(order))
        return sorted(order[held_out:]), sorted(order[:held_out])

    def __call__(self, folder: Path) -> float:
        """Return the accuracy of a run folder's encoder; raise `UserError` if it cannot be used."""
        weights = load_weights(folder)
        run = weights.config
        if run is None:
            raise UserError(f"{folder} is not a run folder of mae-et pretrain")
        encoder = frozen_encoder_from_weights(weights)
        device = distributed.choose_device(self.device)
        config = ProbeConfig(
            folder, num_workers=self.num_workers, device=self.device, seed=self.seed
        )
        rest, held_out = self.split(len(open_dataset(run.data, "train", encoder.channels)))
        found = extract_dataset_features(
            encoder, run.data, config, "train", device, [*rest, *held_out]
        ).to(device)
        train, val = (
            Features(found.vectors[part], found.labels[part])
            for part in (slice(len(rest)), slice(len(rest), None))
        )
        if self.by == "knn":
            return knn_accuracy(train, val, config.neighbours, config.temperature)
        return probe_features(train, val, config.epochs, self.seed).accuracy
