"""Configs of `mae-et reconstruct`, `export` and `prepare`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mae_et.config.schema import DataConfig, Target
from mae_et.errors import UserError

Format = Literal["timm", "hf", "mae"]


@dataclass(frozen=True)
class ReconstructConfig:
    """Write a PNG: a row for each image, of input, masked input, reconstruction and pasted."""

    checkpoint: Path
    """Run folder, checkpoint, or file of released weights with a decoder."""
    images: tuple[Path, ...] = ()
    """Files or folders of images; by default the validation split of the run's data."""
    output: Path = Path("reconstruction.png")
    """The picture."""
    count: int = 8
    """Most images in it."""
    mask_ratio: float = 0.75
    """Share of hidden patches."""
    bandwidth: int | None = None
    """Side of the low-frequency crop that is reconstructed; the base size by default."""
    target: Target | None = None
    """What a released file's decoder predicts: norm_pix, or pixel for the `visualize` files."""
    encoder_num_heads: int | None = None
    """Heads of the encoder, where its width is no published one."""
    decoder_num_heads: int | None = None
    """Heads of the decoder, likewise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes a GPU where there is one."""
    seed: int = 0
    """Seed of the masks."""
    checkpoint_key: str | None = None
    """Choice among several sets of weights in a file, such as teacher."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            UserError: a value is out of range; the sentence names its key.
        """
        if not 0 < self.mask_ratio < 1:
            raise UserError(
                f"mask_ratio must lie between 0 and 1 (both excluded), got {self.mask_ratio}"
            )
        if self.count < 1:
            raise UserError("count must be at least 1")


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint in the layout of another library."""

    checkpoint: Path
    """Run folder (of pre-training or of a classifier), checkpoint, or file of released weights."""
    format: Format
    """timm: safetensors of the encoder; hf: folder for transformers (ViTMAEForPreTraining; ViTModel
    where that cannot hold the decoder); mae: .pth in the layout of facebookresearch/mae. A
    classifier keeps its head (hf: where it classifies by the class token)."""
    output: Path
    """File to write (timm, mae), or folder (hf)."""
    checkpoint_key: str | None = None
    """Choice among several sets of weights in a file, such as teacher."""
    encoder_num_heads: int | None = None
    """Heads of the encoder, where its width is no published one."""
    decoder_num_heads: int | None = None
    """Heads of the decoder, likewise."""


@dataclass(frozen=True)
class PrepareConfig:
    """Write a data set as shards at several sizes, for --data.name shards."""

    output: Path
    """Folder of the shards; what an interrupted preparation left there is gone on with."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set: folder, wds or hfds/NAME."""
    channels: int = 3
    """Channels of the images; 5 and more mean arrays (.npy)."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    """Splits that are written."""
    levels: tuple[int, ...] = (192, 256, 320)
    """Shorter sides of the smaller pictures, in pixels; the original files are kept beside."""
    quality: int = 95
    """JPEG quality of the smaller pictures, whose colours are not subsampled."""
    shard_images: int = 10_000
    """Images of a shard."""
    num_workers: int = 1
    """Shards that are written at once."""
    verify: bool = False
    """Read all that is in the output again, against its checksums, and write nothing."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            UserError: a value is out of range; the sentence names its key.
        """
        if list(self.levels) != sorted(set(self.levels)) or any(x < 1 for x in self.levels):
            raise UserError(f"levels must be rising positive numbers, got {list(self.levels)}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality must lie in [1, 100], got {self.quality}")
        if self.shard_images < 1 or self.num_workers < 1 or not self.splits:
            raise UserError("shard_images, num_workers and splits must be at least 1")
        root = self.data.root
        if root is not None and self.output.absolute().is_relative_to(root.absolute()):
            raise UserError(f"output {self.output} lies in data.root {root}: it would become data")
