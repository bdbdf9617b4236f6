"""Configs of the commands that score a checkpoint; they import no PyTorch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.config import Pool
from finetune.image_size import Size, height_and_width
from mae_et.config.schema import DataConfig
from mae_et.errors import UserError


@dataclass(frozen=True)
class ProbeConfig:
    """Score a pre-trained encoder on labelled data, without training it."""

    checkpoint: Path
    """Run folder, checkpoint, or file of released weights."""
    data: DataConfig | None = None
    """Labelled data; by default what the checkpoint was pre-trained on, if it says so."""
    pool: Pool = "mean"
    """Feature of an image: mean of the patch tokens, or class token."""
    neighbours: int = 20
    """Neighbours of kNN (k)."""
    temperature: float = 0.07
    """Temperature of kNN's votes."""
    epochs: int = 100
    """Passes over the cached features in the linear probe."""
    untrained: bool = False
    """Whether the same encoder with fresh weights is scored too."""
    encoder_num_heads: int | None = None
    """Heads of the encoder, where its width is no published one."""
    decoder_num_heads: int | None = None
    """Heads of the decoder, likewise."""
    output: Path | None = None
    """Folder for the scores (results.json); they are printed alone by default."""
    batch_size: int = 256
    """Images per forward pass."""
    num_workers: int | None = None
    """Loader processes; by default the cores, at most 16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision of the encoder."""
    seed: int = 0
    """Seed of the probe's batches and of fresh weights."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            UserError: a value is out of range; the sentence names its key.
        """
        for name in ("neighbours", "temperature", "epochs", "batch_size"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a fine-tuned checkpoint."""

    checkpoint: Path
    """Run folder of a classifier, or fine-tuned weights in MAE's layout."""
    weights: Literal["last", "best"] = "last"
    """Which of a run's weights: the last, or those of the best top-1."""
    data: DataConfig | None = None
    """Labelled data; by default what the run was trained on."""
    image_size: Size = 224
    """Side of the images in pixels, or [height, width], where the checkpoint does not say it."""
    encoder_num_heads: int | None = None
    """Heads of the encoder, where its width is no published one."""
    output: Path | None = None
    """Folder for the scores (results.json), the confusion table and the scores of each class (CSV);
    none by default."""
    batch_size: int = 256
    """Images per forward pass."""
    num_workers: int | None = None
    """Loader processes; by default the cores, at most 16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            UserError: a value is out of range; the sentence names its key.
        """
        for name, smallest in (
            ("image_size", min(height_and_width(self.image_size))),
            ("batch_size", self.batch_size),
        ):
            if smallest < 1:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class DynamicsConfig:
    """Score the kept checkpoints of a run on low-passed validation images (output.keep_every)."""

    run: Path
    """Run folder of mae-et pretrain."""
    by: Literal["knn", "linear"] = "knn"
    """Accuracy of neighbours, or of a linear probe, among whole training images."""
    bandwidths: tuple[int, ...] = ()
    """Low frequencies that the validation images keep, as a bandwidth in pixels; by default
    eighths of the base size: 1, 2, 3, 4, 6, 8."""
    images: int | None = None
    """Training images that vote or are probed, drawn at random; all by default."""
    output: Path | None = None
    """Folder for the table and the chart; RUN/dynamics by default."""
    batch_size: int = 256
    """Images per forward pass."""
    num_workers: int | None = None
    """Loader processes; by default the cores, at most 16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes a GPU where there is one."""
    seed: int = 0
    """Seed of the probe and of the images that are drawn."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            UserError: a value is out of range; the sentence names its key.
        """
        for name in ("images", "batch_size"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} must be positive, got {value}")
        if any(bandwidth <= 0 for bandwidth in self.bandwidths):
            raise UserError(f"bandwidths must be positive, got {list(self.bandwidths)}")
