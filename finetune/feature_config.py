"""Configs of `mae-et embed`, `mae-et predict` and `mae-et preview --features`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.image_size import Size
from finetune.scoring_config import ClassifierUseConfig, FrozenNetworkConfig
from mae_et.config.data import DataConfig
from mae_et.data.layout import Split
from mae_et.errors import SEEDS, require, require_in, require_png

FilePool = Literal["mean", "cls", "none"]
FILE_TYPES = (".npy", ".parquet", ".safetensors")


@dataclass(frozen=True)
class EmbedConfig(FrozenNetworkConfig):
    """Write the features of images to a file; an interrupted call resumes."""

    output: Path = Path("features.npy")
    """File to write: .npy or .safetensors, with a .csv of names and labels beside it, or .parquet
    (which needs pyarrow). A .json beside it describes the features."""
    split: Split | Literal["all"] = "all"
    """Images to encode: those of one split, or of both, training images first."""
    pool: FilePool = "mean"
    """Feature of an image: mean of the patch tokens [D], class token [D], or all patch tokens
    [N D], row by row."""
    layers: tuple[int, ...] = ()
    """Blocks whose outputs are concatenated to a feature, each after the encoder's final norm:
    counted from 1, or from -1, the last; the last by default."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the numbers in the file."""
    projector: Path | None = None
    """Folder for TensorBoard's embedding projector: at most 5000 images, evenly spaced, with
    thumbnails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            Path(self.output).suffix in FILE_TYPES,
            f"output must end in {', '.join(FILE_TYPES[:-1])} or {FILE_TYPES[-1]}, got "
            f"{self.output}",
        )
        require(
            self.projector is None or self.pool != "none",
            "projector shows one point an image: it cannot be combined with pool none",
        )


@dataclass(frozen=True)
class PredictConfig(ClassifierUseConfig):
    """Write the most likely classes of images to a table; an interrupted call resumes."""

    data: DataConfig | None = None
    """Images, with or without labels; by default the data of the run."""
    output: Path = Path("predictions.csv")
    """CSV to write: name, split, class and probability of each image. A .json beside it describes
    it."""
    split: Split | Literal["all"] = "all"
    """Images to classify: those of one split, or of both, training images first."""
    top_k: int = 5
    """Number of classes for each image, the most likely first; at most all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(Path(self.output).suffix == ".csv", f"output must end in .csv, got {self.output}")
        require_in("(0, inf)", self, "top_k")


@dataclass(frozen=True)
class FeatureMapConfig(FrozenNetworkConfig):
    """Draw the patch features of some images by their first three principal components."""

    images: tuple[Path, ...] = ()
    """Files or folders of images; by default the validation split of the data."""
    save: Path = Path("features.png")
    """PNG to write."""
    count: int = 8
    """Maximum number of images, drawn at random."""
    layer: int = -1
    """Block, counted from 1, or from -1, the last."""
    image_size: Size | None = None
    """Side of the images in pixels, or [height, width], a multiple of the patch; the encoder's own
    by default. A larger one gives a finer map."""
    foreground: bool = False
    """Whether to split the patches by their first component, blank the part that lies further from
    the centre of the images, and draw the components of the other, as DINOv2 does."""
    seed: int = 0
    """Seed of the drawn images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_png(self.save, "save")
        require_in("(0, inf)", self, "count")
        require_in(SEEDS, self, "seed")
