"""The section `data` of a configuration."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_et.config.keys import key, marked_keys
from mae_et.errors import require, require_in

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how a training view is drawn."""

    name: str | None = key(None, "source", "common")
    """folder, shards (from mae-et prepare), synthetic, cifar10, cifar100, fashion_mnist,
    imagenette, wds (tar shards) or hfds/NAME (Hugging Face); when not given, folder
    if there is a root, else synthetic."""
    root: Path | None = key(None, "source", "origin", "move", "rank", "common")
    """Folder of the images, a list of files (.csv, .tsv, .txt), or where a download is kept."""
    listing: Path | None = key(None, "source", "resume", "origin", "rank")
    """Folder for stored listings of image folders, so that millions of files are listed only once.
    Delete it when files are added or removed."""
    train_split: str = key("train", "source")
    """Name of the training split, or of a list of its files in the root."""
    val_split: str = key("val", "source")
    """Name of the split that probes and kNN are scored on, or of a list of its files."""
    download: bool = key(True, "resume", "origin", "rank")
    """Whether a missing torchvision dataset may be downloaded."""
    max_value: float | None = key(None, "source")
    """Divisor of pixel values: 65535 by default for 16-bit images (4095 for 12 bits in 16-bit
    files), 1 for arrays other than uint8."""
    mean: tuple[float, ...] = key(IMAGENET_MEAN, "source", "statistics")
    """Mean of each channel, of images in [0, 1]; one number serves all channels."""
    std: tuple[float, ...] = key(IMAGENET_STD, "source", "statistics")
    """Standard deviation of each channel."""
    scale: tuple[float, float] = key((0.2, 1.0), "view")
    """Area of a random-resized crop, as shares of the image."""
    ratio: tuple[float, float] = key((0.75, 4 / 3), "view")
    """Aspect ratio of a random-resized crop."""
    flip: float = key(0.5, "view")
    """Chance of a horizontal flip."""
    augment: str | None = key(None, "view")
    """RandAugment in timm's notation without its magnitude, which is the stage's
    (rand-mstd0.5-inc1); none by default, as in MAE."""
    eval_crop: float = key(0.875, "statistics")
    """Share of the resized side that the centre crop keeps in evaluation (224 of 256)."""
    replay: dict[int, int] | None = key(None, "view")
    """Mean number of uses of a loaded image at each bandwidth ({96: 4, 160: 2}): recently loaded
    images, drawn at random, complete a batch, flipped and masked anew (EfficientTrain++'s replay
    buffer). Of a mean of 4, 7% of the images are used once and 2% more than 8 times; the first of
    a stage most (27 times). By default every image is loaded."""
    on_error: Literal["skip", "stop"] = key("skip", "resume")
    """What to do with an image that cannot be read: skip uses another one in its place, names the
    file once, and stops the run if there are too many; stop stops it at the first."""
    max_bad_fraction: float = key(0.01, "resume")
    """Fraction of images that may be unreadable before the run stops. Ten images or a tenth of all,
    whichever is less, always may be, unless this is 0."""
    replay_images: int = key(4096, "view")
    """Images that each rank keeps for data.replay, in its memory or, if the GPU decodes, in the
    GPU's: 150 KB each in pre-training at 224, 600 KB in classifiers. EfficientTrain++'s release
    keeps 245,760 at 96 and 65,536 at 160; with fewer, the uses of an image follow each other
    sooner."""
    cache: Literal["none", "ram"] = key("none", "resume", "origin")
    """ram decodes every training image once, at the start, into memory that the loader processes
    and ranks of a machine share: at full size, 3 bytes a pixel, so numbers stay the same. It is for
    small datasets; one line says what was stored, or that the images do not fit and are read from
    files as usual. crop.method decode needs files."""
    synthetic_size: int = key(64, "source")
    """Side of the synthetic images, in pixels."""
    synthetic_train: int = key(4000, "source")
    """Training images of the synthetic dataset."""
    synthetic_val: int = key(1000, "source")
    """Validation images of the synthetic dataset."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, "data.max_value", "data.replay_images", "data.std")
        require_in("[0, 1]", self, "data.flip", "data.max_bad_fraction")
        require_in("(0, 1]", self, "data.eval_crop")
        for name in ("train_split", "val_split"):  # empty, it would be the whole root
            require(
                getattr(self, name) != "", f"data.{name} is empty: give a name, or . for the root"
            )
        require(
            len(self.mean) == len(self.std),
            f"data.mean has {len(self.mean)} and data.std {len(self.std)} numbers: give both, with "
            "one number for each channel or one for all",
        )
        require(all(map(math.isfinite, self.mean)), "data.mean must be finite")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            require(0 < low <= high < math.inf, f"data.{name} must be two rising positive numbers")
        require(self.scale[1] <= 1, "data.scale must not exceed 1")
        replay = (self.replay or {}).values()
        require(all(times > 0 for times in replay), "data.replay must be positive")
        require(
            self.root is None or self.source != "synthetic",
            "data.root is given, but data.name synthetic needs none",
        )
        require(
            self.augment is None
            or re.fullmatch(r"rand(-(?!m\d)\w+(\.[\d.]*)?)*", self.augment) is not None,
            f"data.augment must read like rand-mstd0.5-inc1 (the stage gives the magnitude), "
            f"got {self.augment!r}",
        )

    @property
    def source(self) -> str:
        """The dataset's kind, resolved."""
        return self.name or ("folder" if self.root else "synthetic")


SOURCE_KEYS = marked_keys(DataConfig, "source")
STATISTICS = marked_keys(DataConfig, "statistics")


def resized_side(side: int, eval_crop: float) -> int:
    """Return the side, in pixels, that images are resized to before a centre crop of `side`.

    Rounded down as in timm and MAE (248 for 224 at 0.9), robust to floating-point error.
    """
    return int(side / eval_crop + 1e-6)


def check_statistics(data: DataConfig, channels: int) -> None:
    """Refuse statistics for another number of channels; one number serves all."""
    require(
        len(data.mean) in {1, channels},
        f"data.mean has {len(data.mean)} numbers for {channels} channels",
    )


def check_cache(data: DataConfig, method: str) -> None:
    """Refuse a cache of decoded images where files are needed."""
    require(
        data.cache == "none" or method != "decode",
        "data.cache ram stores whole images, and crop.method decode decodes files at the scale "
        "of each crop: use crop.method fourier or resize",
    )
