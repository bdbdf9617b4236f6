"""Choose the images of online probes: a bounded random sample, the same at every probe."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mae_et.config.data import DataConfig
from mae_et.config.probe import OnlineProbeConfig
from mae_et.data.batch import collate
from mae_et.data.datasets import ImageDataset, open_dataset, why_unlabelled
from mae_et.data.sampler import sample_seed
from mae_et.data.sources.image_folder import HELD_OUT_FRACTION
from mae_et.data.transforms import EvalDataset
from mae_et.errors import Unreadable, UserError
from mae_et.runtime.console import notify

ENOUGH = 200
"""Images to classify for a standard error of at most 3.5 percentage points."""
LEAST = 400, 100
"""Images that vote and are classified if there are as many, whatever they cost."""


class CentreCrops(Dataset[tuple[Tensor, int] | None]):
    """Centre crops of chosen images with their labels.

    With `data.on_error` skip, an image that cannot be read is None.
    """

    def __init__(
        self, source: ImageDataset, data: DataConfig, size: int, indices: Sequence[int]
    ) -> None:
        self.crops = EvalDataset(source, data, size)
        self.skips = data.on_error == "skip"
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, int] | None:
        try:
            return self.crops[self.indices[place]]
        except Unreadable:
            if not self.skips:
                raise
            return None

    @staticmethod
    def collate(samples: list[tuple[Tensor, int] | None]) -> Any:
        """Return images [B C H W] and labels [B] of the readable images; None if there are none."""
        readable = [sample for sample in samples if sample is not None]
        return collate(readable) if readable else None


@dataclass(frozen=True)
class ProbeImages:
    """The images that a probe encodes."""

    data: DataConfig
    """Their source, and how they are prepared."""
    train: ImageDataset
    train_indices: list[int]
    """Images whose features are measured, and vote if they have labels."""
    val: ImageDataset
    val_indices: list[int]
    """Images to classify; none without labels."""


def open_probe_images(
    config: OnlineProbeConfig,
    run: DataConfig,
    source: ImageDataset,
    channels: int,
    most: int,
    seed: int,
) -> ProbeImages:
    """Open the data of the probes, draw their images, and report them in one line.

    A probe shares the preprocessing of the run and, without `probe.data`, its training split
    `source`. It can afford `most` images, but uses `LEAST`.
    """
    data, train = run, source
    if config.data is not None:
        data = replace(run, **vars(config.data))
        train = open_dataset(data, "train", channels)
    order = _shuffled(len(train), seed)
    if unlabelled := why_unlabelled(train):
        chosen = sorted(order[: min(config.train_images, max(most, LEAST[0]))])
        _describe(data, f"effective rank of {len(chosen)} images, no accuracy: {unlabelled}")
        return ProbeImages(data, train, chosen, train, [])
    val, reason = _open_validation(data, train, channels)
    if val is not None:
        val_order = _shuffled(len(val), seed)
    elif config.data is not None:
        raise UserError(f"probe.data: {reason}")
    else:
        held_out = max(1, int(len(train) * HELD_OUT_FRACTION))
        val, val_order, order = train, order[:held_out], order[held_out:]
    wanted = min(config.train_images, len(order)), min(config.val_images, len(val_order))
    share = min(1.0, max(1, most) / sum(wanted))
    voting, classified = (
        max(min(least, count), int(share * count))
        for least, count in zip(LEAST, wanted, strict=True)
    )
    limit = _describe_limit(config.max_fraction, share, classified, wanted[1])
    held = f", held out from the training images: {reason}" if reason else ""
    _describe(data, f"{voting} images vote, {classified} are classified{limit}{held}")
    return ProbeImages(data, train, sorted(order[:voting]), val, sorted(val_order[:classified]))


def _describe_limit(max_fraction: float, share: float, classified: int, wanted: int) -> str:
    """Describe why only a share of the images is classified, and what to set if it is small."""
    if share == 1:
        return ""
    enough, limit = min(ENOUGH, wanted), f"probe.max_fraction {max_fraction:g} allows no more"
    if classified > max(1, int(share * wanted)):
        limit = f"the fewest: more than probe.max_fraction {max_fraction:g} allows"
    if classified < enough:
        needed = math.ceil(100 * max_fraction * enough / (share * wanted)) / 100
        advice = f"set it to {needed:g}" if needed <= 1 else "probe less often"
        error = 50 / math.sqrt(classified)
        limit += f"; standard error {error:.0f} points, {advice} to classify {enough}"
    return f" ({limit})"


def _shuffled(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(sample_seed(seed, count))
    return torch.randperm(count, generator=generator).tolist()


def _open_validation(
    data: DataConfig, train: ImageDataset, channels: int
) -> tuple[ImageDataset | None, str]:
    """Open the validation split; None and the reason if it cannot be used."""
    try:
        val = open_dataset(data, "val", channels)
    except UserError as error:
        return None, str(error)
    if unlabelled := why_unlabelled(val):
        return None, f"the validation split has {unlabelled}"
    if list(val.classes) != list(train.classes):
        return None, "the validation split has other classes"
    return val, ""


def _describe(data: DataConfig, fact: str) -> None:
    notify(f"probe on {data.root or data.source}: {fact}")
