"""Config of `mae-et preview --features`."""

from dataclasses import dataclass
from pathlib import Path

from finetune.image_size import Size
from finetune.scoring_config import FrozenEncoderConfig
from mae_et.errors import require_in


@dataclass(frozen=True)
class FeatureMapConfig(FrozenEncoderConfig):
    """Draw the patch features of some images by their first three principal components."""

    images: tuple[Path, ...] = ()
    """Files or folders of images; by default the validation split of the data."""
    save: Path = Path("features.png")
    """PNG to write."""
    count: int = 8
    """Most images, drawn at random."""
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
        """Refuse impossible values."""
        super().__post_init__()
        require_in("(0, inf)", self, "count", "image_size")
