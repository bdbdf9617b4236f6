"""Configs of commands that score trained networks: probes, evaluation, learning dynamics."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.image_size import Size
from mae_et.config.data import DataConfig
from mae_et.config.efficiency import MOST_WORKERS, ProcessConfig
from mae_et.config.model import Pool
from mae_et.errors import SEEDS, require, require_in
from mae_et.runtime.console import notify


@dataclass(frozen=True)
class FrozenNetworkConfig(ProcessConfig):
    """A checkpoint's network, used without training: on which images, and how fast."""

    checkpoint: Path
    """Run folder, checkpoint, file of released weights (MAE's or timm's layout), Hugging Face
    folder (ViTMAE, ViT, DINOv2), or name of a timm model. Networks other than ViTs give their
    pooled features."""
    architecture: str | None = None
    """timm's name of the checkpoint's network, needed if its weights do not determine it (CLIP,
    SwiGLU, distilled DeiT)."""
    data: DataConfig | None = None
    """Images; by default the data of the pre-training run, if the checkpoint names them."""
    encoder_num_heads: int | None = None
    """Attention heads of the encoder, needed if its width is not a published one."""
    batch_size: int = 256
    """Images per forward pass."""
    checkpoint_key: str | None = None
    """Which of several sets of weights in a file, such as teacher."""
    image_size: Size | None = None
    """Side of the images in pixels, or [height, width], a multiple of the patch; the encoder's own
    by default. Positions are resampled."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, "batch_size", "encoder_num_heads", "image_size")
        require(
            self.architecture is None or self.encoder_num_heads is None,
            "encoder_num_heads: the network named by architecture has its own",
        )
        require_in(f"[0, {MOST_WORKERS}]", self, "num_workers")
        require_in("(0, 1e8]", self, "step_timeout")


@dataclass(frozen=True)
class FeatureScoreConfig(FrozenNetworkConfig):
    """How the features of a frozen encoder are scored: by kNN or a linear probe."""

    data: DataConfig | None = None
    """Labelled data; by default the data of the pre-training run, if the checkpoint names them."""
    pool: Pool = "mean"
    """Feature of an image: mean of the patch tokens, or class token."""
    neighbours: int = 20
    """Neighbours of kNN (k)."""
    temperature: float = 0.07
    """Temperature of the kNN votes."""
    epochs: int = 100
    """Passes of the linear probe over the cached features."""
    output: Path | None = None
    """Folder for results.json; by default RUN/knn or RUN/linear-probe of a finished run, where
    compare and report find them. The scores of other checkpoints are only printed."""
    feature_cache: Path | None = None
    """Folder to keep features in, which a later knn or linear-probe of the same weights, images and
    settings reads instead of images (for ViT-B, 4 GB of ImageNet); none by default. Delete it when
    images change."""
    seed: int = 0
    """Seed of the probe's batches, and of fresh weights or drawn images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in("(0, inf)", self, "neighbours", "temperature", "epochs")
        require_in(SEEDS, self, "seed")


@dataclass(frozen=True)
class ProbeConfig(FeatureScoreConfig):
    """Score a frozen encoder on labelled data."""

    max_images: int | None = None
    """Maximum number of images of each split, drawn evenly from it, for a quick look; all by
    default. The results name it among their settings."""
    untrained: bool = False
    """Whether to score the same encoder with freshly initialised weights too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in("(0, inf)", self, "max_images")


@dataclass(frozen=True)
class ClassifierUseConfig(FrozenNetworkConfig):
    """A trained classifier, used without training."""

    checkpoint: Path
    """Run folder of a classifier, fine-tuned weights in MAE's or timm's layout, Hugging Face folder
    (ViTForImageClassification), or name of a timm model."""
    architecture: str | None = None
    """timm's name of the checkpoint's network, needed if its weights do not determine it (CLIP,
    distilled DeiT, any network that is not a ViT)."""
    weights: Literal["last", "best"] = "last"
    """Weights of a run: the last, or those with the best top-1."""
    image_size: Size | None = None
    """Side of the images in pixels, or [height, width]; by default the checkpoint's. A run has its
    own."""


@dataclass(frozen=True)
class EvaluateConfig(ClassifierUseConfig):
    """Score a trained classifier."""

    data: DataConfig | None = None
    """Labelled data; by default the data of the run."""
    max_images: int | None = None
    """Maximum number of images, drawn evenly from the split, for a quick look; all by default. The
    results name it among their settings."""
    output: Path | None = None
    """Folder for results.json, the confusion matrix and the scores of each class (CSV); by default
    scores are only printed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in("(0, inf)", self, "max_images")


@dataclass(frozen=True)
class DynamicsConfig(FeatureScoreConfig):
    """Score a run's kept checkpoints (output.keep_every) on low-pass filtered images."""

    checkpoint: Path
    """Run folder of mae-et pretrain; or any encoder that knn takes, to compare with: one row."""
    data: DataConfig | None = None
    """Labelled data for another encoder; a run is scored on its own."""
    by: Literal["knn", "linear"] = "knn"
    """Metric: kNN accuracy, or linear probe accuracy, from unfiltered training images."""
    bandwidths: tuple[int, ...] = ()
    """Bandwidths of the low-pass filter, in pixels; by default 1, 2, 3, 4, 6 and 8 eighths of the
    base size."""
    images: int | None = None
    """Training images to use, drawn at random; all by default."""
    output: Path | None = None
    """Folder for the table and the chart; RUN/dynamics by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in("(0, inf)", self, "images", "bandwidths")


def notify_scoring(checkpoint: Path, data: DataConfig) -> None:
    """Print once which checkpoint is scored on which data."""
    notify(f"scoring {checkpoint} on {data.root or data.source}")
