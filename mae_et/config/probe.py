"""The section `probe` of a configuration: evaluation during pre-training."""

from dataclasses import dataclass
from pathlib import Path

from mae_et.config.duration import Duration, duration_in_steps
from mae_et.config.keys import key
from mae_et.errors import require_in


@dataclass(frozen=True)
class ProbeDataConfig:
    """Another dataset to probe on; its images are prepared like the run's."""

    name: str | None = None
    """As data.name: folder if there is a root, else synthetic."""
    root: Path | None = None
    """Folder of the images, or where a download is kept."""
    train_split: str = "train"
    """Name of the split whose images vote."""
    val_split: str = "val"
    """Name of the split that is classified."""


@dataclass(frozen=True)
class OnlineProbeConfig:
    """Probes of the encoder while it trains: kNN, ridge classifier, effective rank."""

    every: Duration | None = key(None, "common")
    """Interval between probes, in steps or as a share of the run such as 5%; also before the first
    step and after the last. By default there are none: a pre-training needs no labels."""
    data: ProbeDataConfig | None = None
    """Labelled data to probe on; by default the run's own. Without labels, only the effective rank
    is measured."""
    train_images: int = 20_000
    """Training images that vote, drawn at random."""
    val_images: int = 5_000
    """Validation images to classify, drawn at random; where there is no validation split, training
    images that do not vote."""
    max_fraction: float = 0.02
    """Largest fraction of the run's time for all probes together: fewer images are drawn if their
    loading and encoding would take more, but not fewer than 400 that vote and 100 to classify."""

    def __post_init__(self) -> None:
        if self.every is not None:
            duration_in_steps(self.every, 1, "probe.every")
        require_in("(0, inf)", self, "probe.train_images", "probe.val_images")
        require_in("(0, 1]", self, "probe.max_fraction")
