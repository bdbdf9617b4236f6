"""Images to encode for a feature file: of one split, of both, or of a whole folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from finetune.image_size import Size, height_and_width
from mae_et.config.data import DataConfig
from mae_et.data.batch import in_one_dtype
from mae_et.data.datasets import ImageDataset, open_dataset
from mae_et.data.images.decoding import UNLABELLED
from mae_et.data.layout import WHOLE_ROOT, Split, split_folder
from mae_et.data.transforms import EvalDataset
from mae_et.errors import UnknownClasses, Unreadable, UserError
from mae_et.runtime.console import say


@dataclass(frozen=True)
class Part:
    """The images of a split."""

    split: str
    source: ImageDataset
    labelled: bool = True
    """False for a split whose classes are not those of the training split."""

    def names(self, data: DataConfig) -> Iterator[str]:
        """Return the name of each image: its path in `data.root`, or its number."""
        names_in = getattr(getattr(self.source, "inner", None), "names_in", None)
        return names_in(data.root) if names_in else map(str, range(len(self.source)))


def open_parts(data: DataConfig, split: Split | Literal["all"], channels: int) -> list[Part]:
    """Open the images of one split, or all images; refuse if there are none.

    With "all", a folder without split folders gives its images in the order of their names; other
    data give the training images, then the validation images.
    """
    if split != "all":
        return [_open_split(data, split, channels)]
    if _has_no_splits(data):
        whole = replace(data, val_split=WHOLE_ROOT)
        return [Part("all", open_dataset(whole, "val", channels))]
    parts: list[Part] = []
    missing: list[UserError] = []
    names: tuple[Split, ...] = ("train", "val")
    for name in names:
        try:
            parts.append(_open_split(data, name, channels))
        except UserError as error:
            missing.append(error)
    if not parts:
        raise missing[0]
    if missing:
        say(f"only the {parts[0].split} split is encoded: {missing[0]}")
    return parts


def _open_split(data: DataConfig, split: Split, channels: int) -> Part:
    try:
        return Part(split, open_dataset(data, split, channels))
    except UnknownClasses as error:
        say(f"{error}; its images are written without labels")
        source = open_dataset(data, split, channels, own_classes=True)
        return Part(split, source, labelled=False)


def _has_no_splits(data: DataConfig) -> bool:
    if data.source != "folder":
        return False
    try:
        return split_folder(data, "train") is None
    except UserError:  # there are split folders, but not this one
        return False


class FeatureImages(Dataset[Any]):
    """Centre crops of several parts, concatenated from `start` on: (pixels [C H W], label).

    With `data.on_error` skip, an unreadable image has no pixels.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        data: DataConfig,
        size: Size,
        channels: int,
        start: int = 0,
    ):
        self.parts, self.start = parts, start
        self.views = [EvalDataset(part.source, data, size) for part in parts]
        self.skips = data.on_error == "skip"
        self.no_pixels = torch.empty(0, channels, *height_and_width(size), dtype=torch.uint8)

    def __len__(self) -> int:
        return sum(map(len, self.views)) - self.start

    def __getitem__(self, index: int) -> tuple[Tensor | None, int]:
        part, inside = _place_of(self.parts, self.start + index)
        pixels: Tensor | None = None
        try:
            pixels, label = self.views[part][inside]
        except Unreadable:
            if not self.skips:
                raise
            labels = self.parts[part].source.labels
            label = UNLABELLED if labels is None else int(labels[inside])
        return pixels, label if self.parts[part].labelled else UNLABELLED

    def collate(
        self, samples: Sequence[tuple[Tensor | None, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the readable images [R C H W], all labels [B], and which are readable [B]."""
        pixels = [image for image, _ in samples if image is not None]
        labels = torch.tensor([label for _, label in samples])
        readable = torch.tensor([image is not None for image, _ in samples])
        return torch.stack(in_one_dtype(pixels)) if pixels else self.no_pixels, labels, readable


def report_parts(parts: Sequence[Part], task: str) -> int:
    """Print how many images each part has, and return their number."""
    counted = ", ".join(f"{len(part.source)} {part.split}" for part in parts)
    say(f"images to {task}: {counted}")
    return sum(len(part.source) for part in parts)


def names_of(parts: Sequence[Part], data: DataConfig) -> Iterator[tuple[str, str]]:
    """Yield the name and the split of each image."""
    return ((name, part.split) for part in parts for name in part.names(data))


def name_of(parts: Sequence[Part], row: int) -> object:
    """Return the name of an image for messages, given its row."""
    part, index = _place_of(parts, row)
    return parts[part].source.name(index)


def error_of(parts: Sequence[Part], row: int) -> str:
    """Return why an image cannot be read, given its row; empty if a new attempt succeeds."""
    part, index = _place_of(parts, row)
    try:
        parts[part].source[index]
    except Unreadable as error:
        return str(error)
    return ""


def _place_of(parts: Sequence[Part], row: int) -> tuple[int, int]:
    """Return the part of an image, given its row, and its index there."""
    for number, part in enumerate(parts):
        if row < len(part.source):
            return number, row
        row -= len(part.source)
    raise IndexError(row)
