"""Config of a classifier's training: full fine-tuning, a probe, or training from scratch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finetune.image_size import Size, height_and_width
from mae_et.config.data import DataConfig
from mae_et.config.duration import Duration, duration_in_steps
from mae_et.config.keys import key
from mae_et.config.model import Pool
from mae_et.config.schema import CropConfig, CurriculumConfig, OptimConfig, OutputConfig, RunConfig
from mae_et.errors import require, require_in

Probe = Literal["none", "linear", "attentive"]


@dataclass(frozen=True)
class NetworkConfig:
    """The network: a pre-trained encoder with a new head, or any timm backbone."""

    checkpoint: Path | None = key(None, "rank", "common")
    """Run folder, checkpoint, released weights or Hugging Face ViTMAE folder to start from. The
    network is its ViT, or model.backbone if that is given."""
    backbone: str | None = key(None, "common")
    """Name of a timm model: trained from scratch, or from a checkpoint of the same model."""
    pretrained: bool = False
    """Whether to fetch the backbone's weights from timm's hub."""
    image_size: Size = key(224, "common")
    """Side of the images in the last stage, in pixels, or [height, width]; bandwidths refer to the
    shorter side. The size that a checkpoint records, or timm for model.pretrained, replaces the
    default."""
    patch_size: int | None = None
    """Side of a patch, in pixels, to resample a checkpoint's ViT to; its own by default."""
    channels: int = 3
    """Image channels."""
    pool: Pool = "mean"
    """Feature a checkpoint's ViT classifies by: mean of the patch tokens, or class token; a named
    backbone keeps its own pooling."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; it rises linearly from 0."""
    head_dropout: float = 0.0
    """Dropout rate before the classifier."""
    probe: Probe = key("none", "common")
    """none trains all weights; linear and attentive train a head on the frozen encoder."""
    encoder_num_heads: int | None = None
    """Attention heads of the checkpoint's encoder, needed if its width is not a published one."""
    checkpoint_key: str | None = None
    """Which of several sets of weights in a file, such as teacher."""

    def __post_init__(self) -> None:
        require(
            self.checkpoint is not None or self.backbone is not None,
            "give --checkpoint (model.checkpoint) or model.backbone",
        )
        require(
            self.probe == "none" or self.backbone is None,
            "model.probe needs a checkpoint's ViT; it cannot be combined with model.backbone",
        )
        require(
            self.probe == "none" or not self.drop_path,
            "model.drop_path needs a trained network; a probe freezes it",
        )
        require_in("[0, 1)", self, "model.drop_path", "model.head_dropout")
        require_in("(0, inf)", self, "model.image_size", "model.patch_size", "model.channels")
        require_in("(0, inf)", self, "model.encoder_num_heads")


@dataclass(frozen=True)
class RecipeConfig:
    """Regularisation of images and labels, in timm's terms."""

    mixup: float = 0.0
    """Mixup alpha; 0 turns it off."""
    cutmix: float = 0.0
    """CutMix alpha; 0 turns it off."""
    smoothing: float = 0.0
    """Label smoothing."""
    erasing: float = 0.0
    """Random erasing probability; erased rectangles are filled with noise."""

    def __post_init__(self) -> None:
        require_in("[0, inf)", self, "recipe.mixup", "recipe.cutmix")
        require_in("[0, 1)", self, "recipe.smoothing", "recipe.erasing")


@dataclass(frozen=True)
class ClassifierOptimConfig(OptimConfig):
    """Optimizer of a classifier."""

    optimizer: Literal["adamw", "lamb", "lars"] = "adamw"
    """Optimizer."""
    batch_size: int = 1024
    """Images per update, over all ranks and accumulation steps."""
    base_lr: float = 5e-4
    """Learning rate per 256 images of batch."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.05
    """Weight decay of parameters with two or more dimensions, except tokens and positions."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW and LAMB."""
    layer_decay: float = key(1.0, "common")
    """Learning rate factor from each layer to the one below; 1 turns it off."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights; no average by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in("(0, 1]", self, "optim.layer_decay")
        require_in("(0, 1)", self, "optim.ema")
        require(
            not self.scale_lr_by_decoder_share,
            "optim.scale_lr_by_decoder_share is an option of pre-training: classifiers have no "
            "decoder",
        )
        require(
            not self.max_skipped_updates or self.optimizer == "adamw",
            "optim.max_skipped_updates needs optim.optimizer adamw",
        )


@dataclass(frozen=True)
class ClassifierOutputConfig(OutputConfig):
    """Outputs of a classifier's run."""

    dir: Path = Path("runs/finetune")
    """Run folder; a run resumes automatically from the checkpoints in it. mae-et finetune RUN
    defaults to RUN/finetune (a probe to RUN/finetune-linear or -attentive), and from other weights
    to runs/finetune-NAME."""
    evaluate_every: Duration | None = key("10%", "common")
    """Interval between evaluations on the validation split, where given as a share at least an
    epoch; null turns them off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate_every is not None:
            duration_in_steps(self.evaluate_every, 1, "output.evaluate_every")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(RunConfig):
    """Train a classifier."""

    model: NetworkConfig
    data: DataConfig = field(default_factory=lambda: DataConfig(scale=(0.08, 1.0)))
    curriculum: CurriculumConfig = field(
        default_factory=lambda: CurriculumConfig(preset="constant", epochs=100, cost="area")
    )
    crop: CropConfig = field(default_factory=lambda: CropConfig(method="resize"))
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    optim: ClassifierOptimConfig = field(default_factory=ClassifierOptimConfig)
    output: ClassifierOutputConfig = field(default_factory=ClassifierOutputConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = height_and_width(self.model.image_size)
        require(
            self.efficiency.sharding == "none",
            "efficiency.sharding is for pre-training; classifiers fit without",
        )
        require(
            self.crop.method != "decode" or height == width,
            "crop.method decode supports square images only",
        )

    @property
    def lacks_recipe(self) -> bool:
        """Whether a checkpoint is fine-tuned with none of what published recipes consist of."""
        fine_tuned = self.model.checkpoint is not None and self.model.probe == "none"
        return fine_tuned and self.recipe == RecipeConfig() and self.optim.layer_decay == 1


def keys_without_effect(config: ClassifierConfig) -> list[str]:
    """Return the keys that differ from their defaults although this training does not use them."""
    of_vit = ("pool", "patch_size", "encoder_num_heads") if config.model.backbone else ()
    unused = (*of_vit, "pretrained" if config.model.checkpoint else "checkpoint_key")
    keys = [f"model.{n}" for n in unused if getattr(config.model, n) != getattr(NetworkConfig, n)]
    if config.optim.optimizer == "lars" and config.optim.betas != ClassifierOptimConfig.betas:
        keys.append("optim.betas")
    return keys
