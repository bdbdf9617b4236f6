"""The section `efficiency` of a configuration: device, precision, compilation, memory, loading."""

from dataclasses import dataclass
from typing import Literal

from mae_et.config.keys import key
from mae_et.errors import require, require_in

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
DecodePlace = Literal["auto", "cpu", "gpu"]
MOST_WORKERS = 1024  # more than any machine has cores for, and few enough to end again


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """How a process computes and loads images."""

    device: Device = key("auto", "common")
    """Device; auto is a GPU if there is one."""
    precision: Precision = key("auto", "common")
    """Autocast precision; auto is bf16 on a GPU that has it, fp16 on others, fp32 on a CPU."""
    num_workers: int | None = key(None, "rank", "common")
    """Loader processes of each rank; 0 loads in the process that computes. By default a rank's
    share of the cores, or a quarter of it on the CPU, 1 to 16. On the CPU, the remaining cores
    compute, unless OMP_NUM_THREADS is set."""
    step_timeout: float | None = 1800
    """Seconds without a finished step or batch after which a rank dumps its stack traces and exits
    with status 75; null waits for ever."""


@dataclass(frozen=True, kw_only=True)
class EfficiencyConfig(ProcessConfig):
    """Speed and memory."""

    tf32: bool = True
    """Whether float32 products may run as TF32 on a GPU."""
    compile: bool | Literal["auto"] = key("auto", "common")
    """Compile transformer blocks with torch.compile (other networks as a whole), on a GPU with a
    separate graph for each bandwidth; auto compiles GPU runs of at least 1000 steps per
    bandwidth."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Whether pre-training on a GPU replays forward and backward passes as CUDA graphs, which
    launch all their kernels at once. Excludes sharding and gradient checkpointing; auto replays
    wherever these are off. Ranks then exchange gradients after a step's backward passes."""
    attention: Literal["torch", "short"] = "torch"
    """Kernels of self-attention in half precision on a GPU: PyTorch's, or for short sequences
    (up to 256 tokens with heads of 32 numbers, 128 with 64) our own in Triton, which have not run
    on a GPU yet. Their results differ by rounding."""
    gradient_checkpointing: bool = False
    """Whether to recompute activations in the backward pass, which saves memory."""
    micro_batch: int | dict[int, int] | Literal["auto"] | None = key(None, "common")
    """Images per forward pass and rank. A number holds at the base size and grows as (base / B)^2
    for a stage of bandwidth B, at constant memory; a mapping gives it for each bandwidth; auto
    takes the largest equal parts that fit in memory. The default is auto when pre-training on a
    GPU without sharding, else a rank's share of the batch at once."""
    sharding: Literal["none", "full", "hybrid"] = "none"
    """full shards weights, gradients and optimizer states over all ranks (FSDP2), for pre-training
    models that do not fit on one GPU; hybrid shards them over the ranks of each node and keeps a
    copy on every node. Files stay the same. efficiency.micro_batch auto then tries the whole,
    unsharded model first; set a number if that does not fit."""
    decode: DecodePlace = "auto"
    """Where JPEGs are decoded, cropped and resized in pre-training: by the GPU (nvJPEG, through
    TorchCodec, the extra gpu, or torchvision), while loader processes only read files, or by the
    CPU in loader processes. For runs on CUDA whose images are mostly JPEGs, without data.augment,
    auto tries both on 64 images of each size and takes the GPU if its images are right, at the
    sizes at which it is faster; a resumed run keeps the choice. Images in memory (data.cache ram)
    are only cropped and resized there. Crops and masks are the same; pixels differ slightly
    (docs/scaling.md)."""

    def __post_init__(self) -> None:
        requested = self.micro_batch
        sizes = requested.values() if isinstance(requested, dict) else [requested]
        require(
            all(not isinstance(size, int) or size > 0 for size in sizes),
            "efficiency.micro_batch must be positive",
        )
        excluded = {
            "efficiency.device cpu": self.device == "cpu",
            "efficiency.sharding": self.sharding != "none",
            "efficiency.gradient_checkpointing": self.gradient_checkpointing,
        }
        for other, given in excluded.items():
            require(
                not (self.cuda_graphs is True and given), f"efficiency.cuda_graphs excludes {other}"
            )
        require_in(f"[0, {MOST_WORKERS}]", self, "efficiency.num_workers")
        require_in("(0, 1e8]", self, "efficiency.step_timeout")

    @property
    def replays(self) -> bool:
        """Whether a GPU may replay passes: cuda_graphs is true, or auto and nothing excludes it."""
        if self.cuda_graphs == "auto":
            return self.sharding == "none" and not self.gradient_checkpointing
        return self.cuda_graphs
