"""What a classifier's training is: fine-tuning, probing, or training from scratch."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finetune.image_size import Size, height_and_width
from mae_et.config.schema import (
    CropConfig,
    CurriculumConfig,
    DataConfig,
    EfficiencyConfig,
    OptimConfig,
    OutputConfig,
    check_statistics,
    duration_in_steps,
)
from mae_et.errors import UserError

Pool = Literal["mean", "cls"]
Probe = Literal["none", "linear", "attentive"]


@dataclass(frozen=True)
class NetworkConfig:
    """The network: a pre-trained encoder with a head, or any timm backbone from scratch."""

    checkpoint: Path | None = None
    """Run folder, checkpoint, released weights, or folder of Hugging Face's ViTMAE to start from;
    the network is then the ViT in it, or the backbone that is named too."""
    backbone: str | None = None
    """Name of a timm model: from scratch, or from a checkpoint of the same model."""
    pretrained: bool = False
    """Whether the backbone's weights are fetched from timm's hub."""
    image_size: Size = 224
    """Side of the images in the last stage, in pixels, or [height, width]; of a rectangle the
    bandwidths of a curriculum are the shorter side."""
    patch_size: int | None = None
    """Side of a patch, in pixels, to which a checkpoint's ViT is resampled; its own by default."""
    channels: int = 3
    """Channels of the images."""
    pool: Pool = "mean"
    """Feature that a checkpoint's ViT classifies by: mean of the patch tokens, or class token; a
    named backbone keeps its own."""
    drop_path: float = 0.0
    """Chance of dropping a residual branch in the last block (rising linearly to it)."""
    probe: Probe = "none"
    """none trains everything; linear and attentive train a head on the frozen encoder."""
    encoder_num_heads: int | None = None
    """Heads of the checkpoint's encoder, where its width is no published one."""

    def __post_init__(self) -> None:
        """Refuse a network that is not named, and other contradictions.

        Raises:
            UserError: the sentence names the key.
        """
        if self.checkpoint is None and self.backbone is None:
            raise UserError("give --checkpoint (model.checkpoint) or model.backbone")
        if self.probe != "none" and self.backbone is not None:
            raise UserError("model.probe is of a checkpoint's ViT; it does not go with a backbone")
        if self.probe != "none" and self.drop_path:
            raise UserError("model.drop_path is of networks that are trained; a probe has none")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"model.drop_path must lie in [0, 1), got {self.drop_path}")
        if min(height_and_width(self.image_size)) < 1:
            raise UserError(f"model.image_size must be positive, got {self.image_size}")
        for name in ("channels", "patch_size", "encoder_num_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.{name} must be positive, got {value}")


@dataclass(frozen=True)
class RecipeConfig:
    """Regularisation of images and labels, in timm's terms."""

    mixup: float = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 is off."""
    smoothing: float = 0.0
    """Label smoothing."""
    erasing: float = 0.0
    """Chance of erasing a rectangle, filled with noise."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            UserError: a value is out of range; the sentence names its key.
        """
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"recipe.{name} must not be negative, got {getattr(self, name)}")
        for name in ("smoothing", "erasing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"recipe.{name} must lie in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class ClassifierOptimConfig(OptimConfig):
    """Optimizer of a classifier."""

    optimizer: Literal["adamw", "lamb", "lars"] = "adamw"
    """Optimizer."""
    batch_size: int = 1024
    """Images per update, over all processes and accumulation steps."""
    base_lr: float = 5e-4
    """Learning rate per 256 images of batch."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW and LAMB."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer to the one below; 1 is off."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights; none when not given."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            UserError: a value is out of range; the sentence names its key.
        """
        super().__post_init__()
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"optim.layer_decay must lie in (0, 1], got {self.layer_decay}")
        if self.max_skipped_updates and self.optimizer != "adamw":
            raise UserError("optim.max_skipped_updates is of optim.optimizer adamw alone")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"optim.ema must lie in (0, 1), got {self.ema}")


@dataclass(frozen=True)
class ClassifierOutputConfig(OutputConfig):
    """What a classifier's run leaves behind."""

    dir: Path = Path("runs/finetune")
    """Run folder; a run resumes by itself from the checkpoints in it."""
    evaluate_every: int | str | None = "10%"
    """Between two evaluations on the validation split; null where there is none."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            UserError: a value is out of range; the sentence names its key.
        """
        super().__post_init__()
        if self.evaluate_every is not None:
            duration_in_steps(self.evaluate_every, 1, "output.evaluate_every")


@dataclass(frozen=True)
class ClassifierConfig:
    """Train a classifier."""

    model: NetworkConfig
    data: DataConfig = field(default_factory=lambda: DataConfig(scale=(0.08, 1.0)))
    curriculum: CurriculumConfig = field(
        default_factory=lambda: CurriculumConfig(preset="constant", epochs=100, cost="area")
    )
    crop: CropConfig = field(default_factory=lambda: CropConfig(method="resize"))
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    optim: ClassifierOptimConfig = field(default_factory=ClassifierOptimConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    output: ClassifierOutputConfig = field(default_factory=ClassifierOutputConfig)
    seed: int = 0
    """Seed of new weights, the order of the data, its augmentation and drop path."""

    def __post_init__(self) -> None:
        """Refuse sections that contradict each other.

        Raises:
            UserError: the sentence names the keys.
        """
        check_statistics(self.data, self.model.channels)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must lie in [0, 2^63), got {self.seed}")
        if self.data.augment is not None and self.model.channels != 3:
            raise UserError("data.augment needs images of 3 channels")
        height, width = height_and_width(self.model.image_size)
        if self.crop.method == "decode" and height != width:
            raise UserError("crop.method decode makes squares, and model.image_size is none")
