"""The configuration of a run: frozen dataclasses that reject impossible values.

Sections are split by effect. `model`, `data`, `curriculum`, `crop` and `optim` decide the numbers;
`efficiency` must not change them beyond rounding; `output` never does.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mae_et.errors import UserError, require

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The keys of `data` that define the dataset, not its augmentation.
SOURCE_KEYS = (
    "name", "root", "listing", "train_split", "val_split", "max_value", "mean", "std",
    "synthetic_size", "synthetic_train", "synthetic_val",
)  # fmt: skip

Preset = Literal["constant", "et", "etpp", "etpp_deit", "etpp_convnext", "custom"]
MOST_WORKERS = 1024  # more than any machine has cores for, and few enough to end again
Target = Literal["pixel", "norm_pix", "hog"]
Duration = int | str


def duration_in_steps(duration: Duration, total_steps: int, key: str = "duration") -> int:
    """Convert a number of steps, or a share of the run such as "5%", to steps (at least 1).

    Raises:
        UserError: neither a positive whole number nor a percentage in (0, 100].
    """
    text = str(duration).strip()
    if re.fullmatch(r"\d+", text) and int(text) > 0:
        return int(text)
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if share and 0 < float(share[1]) <= 100:
        return max(1, round(total_steps * float(share[1]) / 100))
    raise UserError(f"{key} must be a number of steps or a share such as 5%, got {duration!r}")


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Return how many of N patches stay visible: V = floor(N * (1 - mask ratio)).

    Raises:
        ValueError: none would stay visible, or none would be hidden.
    """
    visible = int(patches * (1 - mask_ratio))
    if not 0 < visible < patches:
        raise ValueError(
            f"a mask ratio of {mask_ratio} leaves {visible} of {patches} patches visible; at least "
            "one must be visible and one hidden"
        )
    return visible


@dataclass(frozen=True)
class Stage:
    """One stage of a curriculum; `Curriculum` checks the ranges."""

    bandwidth: int
    """Side of the low-frequency crop, in pixels; a multiple of the patch, at most the base size."""
    share: float
    """Fraction of the budget, positive; shares are normalised by their sum."""
    magnitude: float = 0
    """RandAugment magnitude, 0 to 10; used only with data.augment."""


@dataclass(frozen=True)
class ModelConfig:
    """The masked autoencoder."""

    encoder: str = "vit_base_patch16_224"
    """Name of a timm VisionTransformer with a class token."""
    image_size: int = 224
    """Base size: side of the full-spectrum input, in pixels."""
    patch_size: int | None = None
    """Side of a patch, in pixels; read from the encoder's name when not given."""
    channels: int = 3
    """Channels of the images."""
    encoder_embed_dim: int | None = None
    """Overrides the encoder's width."""
    encoder_depth: int | None = None
    """Overrides the encoder's number of blocks."""
    encoder_num_heads: int | None = None
    """Overrides the encoder's number of heads."""
    decoder_embed_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_num_heads: int = 16
    """Heads of the decoder."""
    decoder_attention: Literal["self", "cross"] = "self"
    """self: mask tokens attend to all tokens (MAE); cross: to the visible ones (after CrossMAE,
    whose release also mixes the encoder's layers for each of its 8 or 12 decoder blocks)."""
    decoder_share: float = 1.0
    """Fraction of the masked patches that a step predicts, drawn at random (as in CrossMAE, whose
    release scales the learning rate by it: optim.scale_lr_by_decoder_share); all of them in MAE."""
    positions: Literal["full_grid", "own_grid"] = "full_grid"
    """Grid that positions are laid on: the base size's, or (to measure what that is worth) the
    smaller one of the input itself."""
    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see."""
    target: Target = "norm_pix"
    """What a masked patch must predict."""
    hog_cell: int = 8
    """Side of a HOG cell, in pixels; must divide the patch."""
    hog_bins: int = 9
    """Orientations of a HOG histogram."""

    def __post_init__(self) -> None:
        named = re.search(r"patch([1-9]\d{0,3})(?!\d)", self.encoder)
        require(
            self.patch_size is not None or named is not None,
            f"model.patch_size is needed: the name {self.encoder!r} does not contain it",
        )
        for name in (
            "encoder_embed_dim",
            "encoder_depth",
            "encoder_num_heads",
            "image_size",
            "channels",
            "decoder_embed_dim",
            "decoder_depth",
            "decoder_num_heads",
            "hog_cell",
            "hog_bins",
            "patch_size",
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name} must be positive, got {value}")
        require(
            0 < self.mask_ratio < 1,
            f"model.mask_ratio must lie between 0 and 1 (both excluded), got {self.mask_ratio}",
        )
        require(
            0 < self.decoder_share <= 1,
            f"model.decoder_share must lie in (0, 1], got {self.decoder_share}",
        )
        require(
            self.image_size % self.patch == 0,
            f"model.image_size {self.image_size} is not a multiple of the patch size {self.patch}",
        )
        require(
            self.decoder_embed_dim % self.decoder_num_heads == 0
            and self.decoder_embed_dim % 4 == 0,
            f"model.decoder_embed_dim {self.decoder_embed_dim} must be a multiple of 4 and of "
            f"model.decoder_num_heads {self.decoder_num_heads}",
        )
        require(
            self.target != "hog" or self.patch % self.hog_cell == 0,
            f"model.hog_cell {self.hog_cell} does not divide the patch size {self.patch}",
        )

    @property
    def patch(self) -> int:
        """Side of a patch, in pixels."""
        if self.patch_size is not None:
            return self.patch_size
        return int(re.findall(r"patch([1-9]\d{0,3})(?!\d)", self.encoder)[0])


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how a training view is drawn."""

    name: str | None = None
    """folder, shards (what mae-et prepare wrote), synthetic, cifar10, cifar100, fashion_mnist,
    imagenette, wds (tar shards) or hfds/NAME (Hugging Face, through timm); when not given, folder
    if there is a root, else synthetic."""
    root: Path | None = None
    """Folder of the images, or where a download is kept."""
    listing: Path | None = None
    """Folder in which listings of folders are kept: one of millions of files is walked once. Delete
    it when files are added or removed."""
    train_split: str = "train"
    """Name of the training split."""
    val_split: str = "val"
    """Name of the split that probes and kNN are scored on."""
    download: bool = True
    """Whether a missing torchvision data set may be downloaded."""
    max_value: float | None = None
    """White of 16-bit images (4095 for 12 bits in 16-bit files; 65535 by default), and what arrays
    other than uint8 are divided by (1 by default)."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, of images in [0, 1]; one number serves all channels."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random-resized crop, as shares of the image."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Aspect ratio of a random-resized crop."""
    flip: float = 0.5
    """Chance of a horizontal flip."""
    augment: str | None = None
    """RandAugment in timm's notation without its magnitude, which is the stage's
    (rand-mstd0.5-inc1); none by default, as in MAE."""
    eval_crop: float = 0.875
    """Share of the resized side that the centre crop keeps in evaluation (224 of 256)."""
    replay: dict[int, int] | None = None
    """Times that a loaded image is used, for each bandwidth named ({96: 4, 160: 2}): where loading
    does not keep up, a batch is completed with images that were loaded shortly before, flipped and
    masked anew (EfficientTrain++'s replay buffer). By default every image is loaded."""
    on_error: Literal["skip", "stop"] = "skip"
    """What to do with an image that cannot be read: skip uses another one in its place, names the
    file once, and stops the run if there are too many; stop stops it at the first."""
    max_bad_fraction: float = 0.01
    """Fraction of images that may be unreadable before the run stops. Ten images or a tenth of all,
    whichever is less, always may be, unless this is 0."""
    replay_images: int = 4096
    """Images that each rank keeps in memory for data.replay: 150 KB each in pre-training at 224,
    600 KB in classifiers. EfficientTrain++'s release keeps 245,760 at 96 and 65,536 at 160; with
    fewer, the uses of an image follow each other sooner."""
    synthetic_size: int = 64
    """Side of the synthetic images, in pixels."""
    synthetic_train: int = 4000
    """Training images of the synthetic data set."""
    synthetic_val: int = 1000
    """Validation images of the synthetic data set."""

    def __post_init__(self) -> None:
        require(
            self.max_value is None or 0 < self.max_value < math.inf,
            f"data.max_value must be positive, got {self.max_value}",
        )
        require(len(self.mean) == len(self.std), "data.mean and data.std differ in length")
        require(all(map(math.isfinite, self.mean)), "data.mean must be finite")
        require(all(0 < value < math.inf for value in self.std), "data.std must be positive")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            require(0 < low <= high < math.inf, f"data.{name} must be two rising positive numbers")
        require(self.scale[1] <= 1, "data.scale must not exceed 1")
        require(
            all(times > 0 for times in (self.replay or {}).values()) and self.replay_images > 0,
            "data.replay and data.replay_images must be positive",
        )
        require(0 <= self.flip <= 1, f"data.flip must lie in [0, 1], got {self.flip}")
        require(
            0 <= self.max_bad_fraction <= 1,
            f"data.max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}",
        )
        require(0 < self.eval_crop <= 1, f"data.eval_crop must lie in (0, 1], got {self.eval_crop}")
        require(
            self.root is None or self.source != "synthetic",
            "data.root is given, but data.name synthetic needs none",
        )
        require(
            self.augment is None
            or re.fullmatch(r"rand(-(?!m\d)\w+(\.[\d.]*)?)*", self.augment) is not None,
            f"data.augment must read like rand-mstd0.5-inc1 (the stage gives the magnitude), "
            f"got {self.augment!r}",
        )

    @property
    def source(self) -> str:
        """The data set's kind, resolved."""
        return self.name or ("folder" if self.root else "synthetic")


@dataclass(frozen=True)
class CurriculumConfig:
    """The frequency curriculum."""

    preset: Preset = "etpp"
    """constant: plain MAE; et: EfficientTrain (ICCV 2023); etpp, etpp_deit, etpp_convnext:
    EfficientTrain++ (TPAMI 2024); custom: the stages given."""
    stages: tuple[Stage, ...] = ()
    """Stages of a custom curriculum."""
    shares_of: Literal["compute", "images"] = "compute"
    """What the shares of a custom curriculum divide."""
    epochs: float = 400
    """Budget: compute, in epochs at the base size (equivalent epochs); of et, and where shares are
    of images, plain epochs."""
    cost: Literal["flops", "area"] = "flops"
    """How an image's cost at a bandwidth is counted: measured FLOPs, or its area."""

    def __post_init__(self) -> None:
        require(
            self.epochs > 0 and math.isfinite(self.epochs),
            f"curriculum.epochs must be positive, got {self.epochs}",
        )
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

    method: Literal["fourier", "resize", "decode"] = "fourier"
    """fourier: exact low-frequency crop (the paper); resize: antialiased bicubic resizing of the
    augmented image (the paper's released code resizes it with Pillow's Lanczos filter instead);
    decode: resizing in the loader, from a JPEG decoded no finer than needed (the fastest)."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, and schedules that are functions of the compute done."""

    batch_size: int = 4096
    """Images per update, over all ranks and accumulation steps; constant over stages."""
    base_lr: float = 1.5e-4
    """Learning rate per 256 images of batch."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_fraction: float = 0.05
    """Share of the compute over which the learning rate rises (40 of 800 epochs in MAE)."""
    decay_fraction: float | None = None
    """Share of the compute at the end over which the learning rate falls, in a straight line; it is
    constant from the warm-up to there, so that runs of other lengths can branch off. By default it
    falls as half a cosine from the warm-up on."""
    weight_decay: float = 0.05
    """Weight decay of parameters with two or more dimensions."""
    weight_decay_end: float | None = None
    """Weight decay at the end, reached by a cosine; constant when not given."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    clip_grad: float | None = None
    """Largest norm of the gradient; no clipping when not given."""
    scale_lr_by_decoder_share: bool = False
    """Multiply the learning rate by model.decoder_share, as CrossMAE's release does; pre-training
    only."""
    max_skipped_updates: int = 0
    """Consecutive updates that may be skipped because the loss or a gradient is NaN or infinite;
    one more stops the run. 0 stops it at the first."""

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "optim.batch_size must be positive")
        require(0 < self.base_lr < math.inf, f"optim.base_lr must be positive, got {self.base_lr}")
        require(0 <= self.min_lr <= self.lr, "optim.min_lr must lie between 0 and the peak")
        require(
            0 <= self.warmup_fraction < 1,
            f"optim.warmup_fraction must lie in [0, 1), got {self.warmup_fraction}",
        )
        require(
            self.decay_fraction is None or 0 < self.decay_fraction <= 1 - self.warmup_fraction,
            "optim.decay_fraction must lie in (0, 1], and its sum with optim.warmup_fraction must "
            f"not exceed 1, got {self.decay_fraction}",
        )
        for name in ("weight_decay", "weight_decay_end"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < math.inf,
                f"optim.{name} must not be negative, got {value}",
            )
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas lie in [0, 1), got {self.betas}",
        )
        require(self.clip_grad is None or self.clip_grad > 0, "optim.clip_grad must be positive")
        require(self.max_skipped_updates >= 0, "optim.max_skipped_updates must not be negative")

    @property
    def lr(self) -> float:
        """Peak learning rate, by the linear scaling rule."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class EfficiencyConfig:
    """How fast the same numbers are reached."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; auto is bf16 on a GPU that has it, fp16 on others, fp32 on a CPU."""
    tf32: bool = True
    """Whether float32 products may run as TF32 on a GPU."""
    compile: bool | Literal["auto"] = "auto"
    """Compile transformer blocks with torch.compile (other networks as a whole), with graphs of
    their own for each bandwidth; auto compiles runs on a GPU of at least 1000 steps a bandwidth."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass to save memory."""
    micro_batch: int | dict[int, int] | Literal["auto"] | None = None
    """Images per forward pass and rank. A number holds at the base size and grows as (base / B)^2
    for a stage of bandwidth B, at constant memory; a mapping gives it for each bandwidth; auto
    takes the largest equal parts that fit in memory. The default is auto when pre-training on a
    GPU without sharding, else a rank's share of the batch at once."""
    sharding: Literal["none", "full"] = "none"
    """full shards weights, gradients and optimizer states over all ranks (FSDP2), for pre-training
    models that do not fit on one GPU; files stay the same. efficiency.micro_batch auto then
    tries the whole, unsharded model first; set a number if that does not fit."""
    num_workers: int | None = None
    """Loader processes of each rank; 0 loads in the training process. By default a rank's share of
    the cores, at most 16."""
    decode: Literal["auto", "cpu", "gpu"] = "cpu"
    """Where JPEGs are decoded, cropped and resized in pre-training: by the GPU (nvJPEG, through
    TorchCodec, the extra gpu, or torchvision), while loader processes only read files, or by the
    CPU in loader processes. auto takes the GPU for runs on CUDA whose images are mostly JPEGs,
    without data.augment and data.replay. Crops and masks are the same; pixels
    differ slightly (docs/scaling.md). The default is cpu until this has been checked on a GPU."""
    step_timeout: float | None = 1800
    """Seconds without a finished step (or scored batch) after which a rank dumps its stack traces
    and exits with status 75; null waits for ever."""

    def __post_init__(self) -> None:
        asked = self.micro_batch
        sizes = asked.values() if isinstance(asked, dict) else [asked]
        require(
            all(not isinstance(size, int) or size > 0 for size in sizes),
            "efficiency.micro_batch must be positive",
        )
        require(
            self.num_workers is None or 0 <= self.num_workers <= MOST_WORKERS,
            f"efficiency.num_workers must lie in [0, {MOST_WORKERS}], got {self.num_workers}",
        )
        require(
            self.step_timeout is None or 0 < self.step_timeout <= 1e8,
            "efficiency.step_timeout must be positive (and at most 1e8, three years), or null",
        )


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes; intervals are steps, or a share of the run such as 5%."""

    dir: Path = Path("runs/pretrain")
    """Run folder; a run resumes automatically from the checkpoints in it."""
    log_every: Duration = 20
    """Interval between rows of metrics."""
    checkpoint_every: Duration = "2%"
    """Interval between checkpoints."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: Duration | None = None
    """Interval of checkpoints to keep permanently; none by default."""
    reconstruct_every: Duration = "10%"
    """Interval between images of reconstructions."""
    reconstruct_images: int = 8
    """Number of images to reconstruct; 0 turns it off."""
    tensorboard: bool = True
    """Whether TensorBoard files are written."""

    def __post_init__(self) -> None:
        require(self.keep_last > 0, "output.keep_last must be at least 1")
        require(
            self.reconstruct_images >= 0,
            f"output.reconstruct_images must not be negative, got {self.reconstruct_images}",
        )
        for name in ("log_every", "checkpoint_every", "keep_every", "reconstruct_every"):
            duration = getattr(self, name)
            if duration is not None:
                duration_in_steps(duration, 1, f"output.{name}")


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-train a masked autoencoder under a frequency curriculum."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    seed: int = 0
    """Seed of the weights, the order of the data, its augmentation and the masks."""

    def __post_init__(self) -> None:
        check_statistics(self.data, self.model.channels)
        require(0 <= self.seed < 2**63, f"seed must lie in [0, 2^63), got {self.seed}")
        if self.data.augment is not None:
            require(self.model.channels == 3, "data.augment needs images of 3 channels")
            whole = all(stage.magnitude % 1 == 0 for stage in self.curriculum.stages)
            require(whole, "data.augment needs stages of whole magnitudes")
        root, folder = self.data.root, self.output.dir
        require(
            root is None
            or self.data.source != "folder"
            or not folder.absolute().is_relative_to(root.absolute()),
            f"output.dir {folder} lies in data.root {root}: its images would become data",
        )


def check_statistics(data: DataConfig, channels: int) -> None:
    """Refuse statistics that do not fit the channels.

    Raises:
        UserError: there are neither one nor as many numbers.
    """
    require(
        len(data.mean) in {1, channels},
        f"data.mean has {len(data.mean)} numbers for {channels} channels",
    )
