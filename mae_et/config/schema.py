"""The configuration of a run: frozen dataclasses that reject impossible values.

Sections are split by effect. `model`, `init`, `data`, `curriculum`, `crop` and `optim` decide the
numbers; `efficiency` must not change them beyond rounding, except for `decode`, which chooses among
JPEG decoders and filters; `probe` and `output` never do.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from mae_et.config.data import DataConfig, check_cache, check_statistics
from mae_et.config.duration import Duration, duration_in_steps
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.config.init import InitConfig
from mae_et.config.keys import key
from mae_et.config.model import ModelConfig
from mae_et.config.probe import OnlineProbeConfig
from mae_et.errors import SEEDS, require, require_in

Preset = Literal["constant", "et", "etpp", "etpp_deit", "etpp_convnext", "custom"]
SharesOf = Literal["compute", "images"]
Method = Literal["fourier", "resize", "decode"]
ENCODER = "encoder.safetensors"


@dataclass(frozen=True)
class Stage:
    """One stage of a curriculum; `Curriculum` checks the ranges."""

    bandwidth: int = 0
    """Side of the low-frequency crop, in pixels; a multiple of the patch, at most the base size,
    which 0 stands for."""
    share: float = 1
    """Fraction of the budget, positive; shares are normalised by their sum."""
    magnitude: float = 0
    """RandAugment magnitude, 0 to 10; used only with data.augment."""


@dataclass(frozen=True)
class CurriculumConfig:
    """The frequency curriculum."""

    preset: Preset = key("etpp", "common")
    """constant: plain MAE; et: EfficientTrain (ICCV 2023); etpp, etpp_deit, etpp_convnext:
    EfficientTrain++ (TPAMI 2024); custom: the stages given."""
    stages: tuple[Stage, ...] = ()
    """Stages of a custom curriculum: '[{bandwidth: 64, share: 2}, {bandwidth: 128, share: 8}]'."""
    shares_of: SharesOf = "compute"
    """Quantity that the shares of a custom curriculum divide."""
    epochs: float = key(400, "branch", "extend", "search", "common")
    """Budget: compute, in epochs at the base size (equivalent epochs); plain epochs for et, and if
    shares are of images."""
    cost: Literal["flops", "area"] = "flops"
    """How an image's cost at a bandwidth is counted: FLOPs (for MAE, with the published decoder,
    which predicts every patch), or its area."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, "curriculum.epochs")
        require(
            self.preset == "custom" or self.shares_of == "compute",
            "curriculum.shares_of needs curriculum.preset custom; presets set their own",
        )
        require(
            bool(self.stages) == (self.preset == "custom"),
            "curriculum.stages needs curriculum.preset custom, which needs curriculum.stages",
        )


@dataclass(frozen=True)
class CropConfig:
    """How images are reduced to a bandwidth."""

    method: Method = key("fourier", "common")
    """fourier: exact low-frequency crop (the paper); resize: antialiased bicubic resizing of the
    augmented image (the paper's released code resizes it with Pillow's Lanczos filter instead);
    decode: resizing in the loader, from a JPEG decoded no finer than needed (the fastest)."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, and schedules that are functions of the compute done."""

    batch_size: int = key(4096, "common")
    """Images per update, over all ranks and accumulation steps; constant over stages."""
    base_lr: float = key(1.5e-4, "branch", "common")
    """Learning rate per 256 images of batch."""
    min_lr: float = key(0.0, "branch", "extend")
    """Learning rate at the end of the run."""
    warmup_fraction: float = key(0.05, "branch", "extend")
    """Share of the compute over which the learning rate rises (40 of 800 epochs in MAE)."""
    decay_fraction: float | None = key(None, "branch", "extend")
    """Share of the compute at the end over which the learning rate falls, in a straight line; it is
    constant from the warm-up to there. The checkpoint at the start of the decay is never deleted,
    so that longer runs can branch off (pretrain RUN --extend-to EPOCHS). By default it falls as
    half a cosine from the warm-up on."""
    weight_decay: float = key(0.05, "branch", "common")
    """Weight decay of parameters with two or more dimensions."""
    weight_decay_end: float | None = key(None, "branch")
    """Weight decay at the end, reached by a cosine; constant when not given."""
    betas: tuple[float, float] = key((0.9, 0.95), "branch")
    """AdamW's betas."""
    clip_grad: float | None = key(None, "branch")
    """Largest norm of the gradient; no clipping when not given."""
    scale_lr_by_decoder_share: bool = False
    """Multiply the learning rate by model.decoder_share, as CrossMAE's release does; pre-training
    only."""
    max_skipped_updates: int = key(0, "resume")
    """Consecutive updates that may be skipped because the loss or a gradient is NaN or infinite;
    one more stops the run. 0 stops it at the first."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, "optim.batch_size", "optim.base_lr")
        require_in("(0, inf]", self, "optim.clip_grad")
        require_in("[0, inf)", self, "optim.weight_decay", "optim.weight_decay_end")
        require_in("[0, inf)", self, "optim.max_skipped_updates")
        require_in("[0, 1)", self, "optim.warmup_fraction", "optim.betas")
        require(
            0 <= self.min_lr <= self.lr,
            f"optim.min_lr must lie between 0 and the peak learning rate, {self.lr:g}, got "
            f"{self.min_lr:g}",
        )
        require(
            self.decay_fraction is None or 0 < self.decay_fraction <= 1 - self.warmup_fraction,
            "optim.decay_fraction must lie in (0, 1], and its sum with optim.warmup_fraction must "
            f"not exceed 1, got {self.decay_fraction}",
        )

    @property
    def lr(self) -> float:
        """Peak learning rate, by the linear scaling rule."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class OutputConfig:
    """Files that a run writes; intervals are steps, or a share of the run such as 5%."""

    dir: Path = key(Path("runs/pretrain"), "rank", "common")
    """Run folder; a run resumes automatically from the checkpoints in it."""
    log_every: Duration = 20
    """Interval between rows of metrics."""
    checkpoint_every: Duration = "2%"
    """Interval between checkpoints, which are written while training continues."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: Duration | None = None
    """Interval of checkpoints to keep permanently; none by default."""
    reconstruct_every: Duration = "10%"
    """Interval between images of reconstructions."""
    reconstruct_images: int = 8
    """Number of images to reconstruct; 0 turns these and preview.png off."""
    tensorboard: bool = True
    """Whether TensorBoard files are written."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, "output.keep_last")
        require_in("[0, inf)", self, "output.reconstruct_images")
        for name in ("log_every", "checkpoint_every", "keep_every", "reconstruct_every"):
            duration = getattr(self, name)
            if duration is not None:
                duration_in_steps(duration, 1, f"output.{name}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The sections common to all trainings; checks their keys against each other."""

    outputs: ClassVar[tuple[str, ...]] = ()  # the files of a finished run besides results.json

    model: Any  # each kind of run has its own; all have `channels` and `image_size`
    data: DataConfig = field(default_factory=DataConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    seed: int = key(0, "branch", "common")
    """Seed of new weights, the order of the data, its augmentation, masks and stochastic depth."""
    branch_from: Path | None = key(None, "origin", "rank")
    """Run folder, or a checkpoint in one (RUN/checkpoints/step-N.pt), whose full state is continued
    in a new folder, with other values of optim, curriculum.epochs or seed. Of a folder, its newest
    checkpoint. On the command line, the keys not given are those of the run."""

    def __post_init__(self) -> None:
        size = self.model.image_size  # the base size of rectangles is the shorter side
        base = size if isinstance(size, int) else min(size)
        stages = tuple(replace(s, bandwidth=s.bandwidth or base) for s in self.curriculum.stages)
        object.__setattr__(self, "curriculum", replace(self.curriculum, stages=stages))
        check_statistics(self.data, self.model.channels)
        check_cache(self.data, self.crop.method)
        require_in(SEEDS, self, "seed")
        require(
            self.data.augment is None or self.model.channels == 3,
            "data.augment needs images of 3 channels",
        )

    @property
    def continues(self) -> Path | None:
        """The run, or a checkpoint in one, that this run continues in a folder of its own."""
        return self.branch_from


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Pre-train a masked autoencoder under a frequency curriculum."""

    outputs = (ENCODER,)

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.augment is not None:
            whole = all(stage.magnitude % 1 == 0 for stage in self.curriculum.stages)
            require(whole, "data.augment needs stages of whole magnitudes")
        require(
            self.branch_from is None or self.init.extends is None,
            "branch_from and init.extends exclude each other",
        )

    @property
    def continues(self) -> Path | None:
        """The run, or a checkpoint in one, that this run continues in a folder of its own."""
        return self.branch_from or self.init.extends
