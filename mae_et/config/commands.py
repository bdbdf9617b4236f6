"""Configs of `mae-et reconstruct`, `export` and `prepare`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mae_et.config.data import DataConfig
from mae_et.config.model import Target
from mae_et.errors import UserError, require, require_in

Format = Literal["timm", "hf", "mae"]


@dataclass(frozen=True)
class ReconstructConfig:
    """Write a PNG: a row for each image, of input, masked input, reconstruction and pasted."""

    checkpoint: Path
    """Run folder, checkpoint, or file of released weights with a decoder."""
    images: tuple[Path, ...] = ()
    """Files or folders of images; by default the validation split of the run's data."""
    output: Path = Path("reconstruction.png")
    """PNG to write."""
    count: int = 8
    """Maximum number of images."""
    mask_ratio: float = 0.75
    """Fraction of patches to mask, in (0, 1)."""
    bandwidth: int | None = None
    """Side of the low-frequency crop to reconstruct, in pixels; the base size by default."""
    target: Target | None = None
    """Target of a released decoder: norm_pix, or pixel for the `visualize` files."""
    encoder_num_heads: int | None = None
    """Attention heads of the encoder, needed if its width is not a published one."""
    decoder_num_heads: int | None = None
    """Attention heads of the decoder, likewise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes a GPU where there is one."""
    seed: int = 0
    """Seed of the masks."""
    checkpoint_key: str | None = None
    """Choice among several sets of weights in a file, such as teacher."""

    def __post_init__(self) -> None:
        require_in("(0, 1)", self, "mask_ratio")
        require_in("(0, inf)", self, "count")


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
    """Attention heads of the encoder, needed if its width is not a published one."""
    decoder_num_heads: int | None = None
    """Attention heads of the decoder, likewise."""


@dataclass(frozen=True)
class PrepareConfig:
    """Write a dataset as shards at several sizes, for --data.name shards."""

    output: Path
    """Folder of the shards; an interrupted preparation resumes from it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Dataset: folder, wds or hfds/NAME."""
    channels: int = 3
    """Channels of the images; 5 and more mean arrays (.npy)."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    """Splits to write."""
    levels: tuple[int, ...] = (192, 256, 320)
    """Shorter sides of the smaller images, in pixels; the original files are stored too."""
    quality: int = 95
    """JPEG quality of the smaller images, 1 to 100, without chroma subsampling."""
    shard_images: int = 10_000
    """Images per shard."""
    num_workers: int = 1
    """Shards written in parallel."""
    verify: bool = False
    """Check the output against its checksums, and write nothing."""

    def __post_init__(self) -> None:
        if list(self.levels) != sorted(set(self.levels)) or any(x < 1 for x in self.levels):
            raise UserError(f"levels must be rising positive numbers, got {list(self.levels)}")
        require_in("[1, 100]", self, "quality")
        require_in("(0, inf)", self, "shard_images", "num_workers")
        require(bool(self.splits), "splits must be at least one of train and val")
        root = self.data.root
        if root is not None and self.output.absolute().is_relative_to(root.absolute()):
            raise UserError(f"output {self.output} lies in data.root {root}: it would become data")
