"""Configs of commands: options beside a recipe, and files to read and write."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mae_et.config.data import DataConfig
from mae_et.config.efficiency import Device
from mae_et.config.keys import key
from mae_et.config.model import Target
from mae_et.config.schema import PretrainConfig
from mae_et.errors import SEEDS, UserError, require, require_in, require_png

Format = Literal["timm", "hf", "mae"]
TableFormat = Literal["md", "csv", "latex"]


@dataclass(frozen=True)
class ReconstructConfig:
    """Write a PNG with a row for each image: input, masked input, reconstruction, pasted."""

    checkpoint: Path
    """Run folder, checkpoint, or file of released weights with a decoder."""
    images: tuple[Path, ...] = ()
    """Files or folders of images; by default the validation split of the run's data."""
    output: Path = Path("reconstruction.png")
    """PNG to write."""
    count: int = 8
    """Maximum number of images."""
    mask_ratio: float | None = None
    """Fraction of patches to mask, in (0, 1); that of the checkpoint by default."""
    bandwidth: int | None = None
    """Side of the low-frequency crop to reconstruct, in pixels; the base size by default."""
    target: Target | None = None
    """Target of a released decoder: norm_pix, or pixel for the `visualize` files."""
    encoder_num_heads: int | None = None
    """Attention heads of the encoder, needed if its width is not a published one."""
    decoder_num_heads: int | None = None
    """Attention heads of the decoder, likewise."""
    device: Device = "auto"
    """Device; auto is a GPU if there is one."""
    seed: int = 0
    """Seed of the masks."""
    checkpoint_key: str | None = None
    """Which of several sets of weights in a file, such as teacher."""

    def __post_init__(self) -> None:
        require_png(self.output, "output")
        require_in("(0, 1)", self, "mask_ratio")
        require_in("(0, inf)", self, "count", "encoder_num_heads", "decoder_num_heads")
        require_in(SEEDS, self, "seed")


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint in the layout of another library."""

    checkpoint: Path
    """Run folder (of pre-training or of a classifier), checkpoint, or file of released weights."""
    format: Format
    """timm: folder that timm opens as local-dir:FOLDER, or, if output ends in .safetensors, a file
    of weights; hf: folder for transformers (ViTMAEForPreTraining; ViTModel where that cannot hold
    the decoder); mae: .pth in the layout of facebookresearch/mae. A classifier keeps its head (hf:
    where it classifies by the class token)."""
    output: Path
    """Folder to write (timm, hf), or file (mae; timm: FILE.safetensors)."""
    checkpoint_key: str | None = None
    """Which of several sets of weights in a file, such as teacher."""
    encoder_num_heads: int | None = None
    """Attention heads of the encoder, needed if its width is not a published one."""
    decoder_num_heads: int | None = None
    """Attention heads of the decoder, likewise."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, "encoder_num_heads", "decoder_num_heads")


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


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What `mae-et plan` prints about the plan of a run."""

    json: bool = key(False, "common")
    """Print one line of JSON."""
    against_epochs: float | None = key(None, "common")
    """Epochs of the constant-bandwidth baseline; by default 1600 (MAE's), below 100 equivalent
    epochs those of the plan's own images."""
    images: int | None = key(None, "common")
    """Images of an epoch, if the dataset is elsewhere."""
    throughput: str | None = key(None, "common")
    """Images/s of one GPU at each bandwidth, '{96: 5200, 224: 1200}', or by the images of a step,
    '{96: {64: 900, 512: 5200}, 224: 1200}'; or a finished run's folder; or a file of mae-et bench
    node."""
    loader: str | None = key(None, "common")
    """Images/s of one loader core at each bandwidth, or a finished run's folder."""
    gpus: str | None = key(None, "common")
    """GPU counts: 1,8,64 (1 to 1024)."""
    cores_per_gpu: float | None = key(None, "common")
    """Loader cores of a GPU."""

    def check_options(self) -> None:
        """Refuse impossible values."""
        require_in("(0, 1e15)", self, "images")
        require_in("(0, inf)", self, "against_epochs")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PlanOptions, PretrainConfig):
    """Print stages, steps and cost of a pre-training; of a classifier's with a config of its own.

    mae-et plan --config supervised/resnet50, or finetune/vit_b16 with --checkpoint.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_options()


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(PretrainConfig):
    """Draw your images as the encoder sees them in each stage of a curriculum.

    mae-et preview RUN draws it for a run; mae-et preview --features CHECKPOINT draws the features
    of an encoder.
    """

    save: Path = key(Path("preview.png"), "common")
    """PNG to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_png(self.save, "save")


@dataclass(frozen=True, kw_only=True)
class NodeConfig(PretrainConfig):
    """Measure this machine for a pre-training recipe.

    Images/s of training and loading, the exchange between GPUs, a checkpoint; then its hours, and
    what limits it.
    """

    json: bool = key(False, "common")
    """Print one line of JSON instead of tables."""
    save: Path | None = key(None, "common")
    """JSON file, also for plan --throughput FILE."""
    seconds: float = key(180.0, "common")
    """Bound of the measurement."""
    images: int | None = key(None, "common")
    """Images of an epoch, if the dataset is elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in("(0, 86400]", self, "seconds")
        require_in("(0, inf)", self, "images")


@dataclass(frozen=True)
class CompareConfig:
    """Compare the results of several runs."""

    runs: list[Path]
    """Run folders."""
    columns: str | None = None
    """Config keys and figures to show, with * for any characters: optim.base_lr,knn,*top-1; by
    default the keys in which the configs differ, and the main figures."""
    format: TableFormat = "md"
    """md: Markdown; latex: a tabular of booktabs; csv: numbers that are not rounded, without means
    over seeds."""
    output: Path | None = None
    """File for the table, which is also printed."""
    json: bool = False
    """Print one line of JSON instead, a list of runs: numbers that are not rounded, without means
    over seeds."""


@dataclass(frozen=True)
class ReportConfig:
    """Write an HTML page about runs."""

    runs: list[Path]
    """Run folders."""
    output: Path = Path("report.html")
    """HTML file."""
