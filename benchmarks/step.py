"""Measure the time and memory of a training step, and the frequency crop's share of it.

    mae-et bench step [--encoder NAME --batch N --rounds N --compile true]
    mae-et bench crop

Every arm runs forward, backward and the optimizer on the same batch in memory; arms are
interleaved. The first is the plain reference of `benchmarks/reference.py` at the base size; on a
GPU, the others are replayed as CUDA graphs, as in a run. Memory is the peak of a separate process
that builds the arm and runs two steps, above its start.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_et.config.efficiency import Device, Precision
from mae_et.config.model import ModelConfig
from mae_et.curriculum.frequency import low_frequency_crop
from mae_et.errors import require_in
from mae_et.monitoring.tables import markdown_table
from mae_et.runtime.distributed import choose_device
from mae_et.training.metrics import peak_memory

from .rounds import interleave
from .training_step import reference_step, training_step, wait

BANDWIDTHS = (96, 160, 224)
# CrossMAE predicts a quarter of all patches: a third of the hidden ones.
CROSS: dict[str, Any] = {"decoder_attention": "cross", "decoder_share": 1 / 3, "decoder_depth": 4}
SHALLOW: dict[str, Any] = {"decoder_depth": 2, "decoder_embed_dim": 256, "decoder_num_heads": 8}


@dataclass(frozen=True)
class StepConfig:
    """Compare training steps with a plain reference in one run."""

    encoder: str = "vit_small_patch16_224"
    """Name of a timm VisionTransformer."""
    batch: int = 32
    """Images of a step."""
    rounds: int = 5
    """Number of rounds, after one to warm up."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    """Precisions of mae-et's own arms."""
    compile: bool = False
    """Whether to run compiled arms too."""
    memory: bool = True
    """Whether to measure peak memory."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""

    def __post_init__(self) -> None:
        require_in("(0, inf)", self, "batch", "rounds")


def arms(config: StepConfig) -> dict[str, partial[Callable[[], object]]]:
    """Return the builder of each arm, by name; the plain reference comes first."""
    device = choose_device(config.device)
    whole = ModelConfig(config.encoder)
    shallow, cross = replace(whole, **SHALLOW), replace(whole, **CROSS)
    found = {"reference, fp32, 224": partial(reference_step, whole, config.batch, "fp32", device)}
    for precision in config.precisions:
        step = partial(training_step, batch=config.batch, precision=precision, device=device)
        for bandwidth in reversed(BANDWIDTHS):
            found[f"ours, {precision}, {bandwidth}"] = partial(step, whole, bandwidth=bandwidth)
        at_base = partial(step, bandwidth=224)
        found[f"shallow decoder, {precision}, 224"] = partial(at_base, shallow)
        found[f"cross decoder, {precision}, 224"] = partial(at_base, cross)
        if config.compile:
            compiled = partial(at_base, compiled=True)
            found[f"ours, {precision}, compiled, 224"] = partial(compiled, whole)
            found[f"cross decoder, {precision}, compiled, 224"] = partial(compiled, cross)
    return found


def operations(step: Callable[[], object]) -> int:
    """Return the FLOPs of the matrix products of a step, forward and backward."""
    # The counter does not support fused attention on a CPU; the plain form has the same products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def bench_step(config: StepConfig) -> dict[str, Any]:
    """Measure training steps and their memory against a plain reference."""
    builders = arms(config)
    # In separate processes: memory retained by one arm would count for the next.
    peaks = (
        {name: peak(build, choose_device(config.device)) for name, build in builders.items()}
        if config.memory
        else {}
    )
    # A compiled step has the same FLOPs; a replayed one calls no operators that could be counted.
    flops = {
        name: operations(build() if "reference" in name else build(replayed=False))
        for name, build in builders.items()
        if "compiled" not in name
    }
    steps = {name: build() for name, build in builders.items()}
    speeds = interleave(steps, config.rounds)
    first = next(iter(builders))
    rows = []
    for name, speed in speeds.items():
        memory = (
            f"{peaks[name] / 2**30:.2f} GiB ({peaks[name] / peaks[first]:.2f}x)" if peaks else "-"
        )
        counted = f"{flops[name] / flops[first]:.3f}x" if name in flops else ""
        per_second = f"{config.batch / speed.median_seconds:.1f}"
        rows.append([name, per_second, speed.ratio(), counted, memory])
    print(markdown_table(["step", "images/s", "times the reference", "FLOPs", "memory"], rows))
    return {
        name: {
            "images_per_second": config.batch / speed.median_seconds,
            "ratios": speed.ratios,
            "flops": flops.get(name),
            "memory_bytes": peaks.get(name),
        }
        for name, speed in speeds.items()
    }


def bench_crop(config: StepConfig) -> dict[str, Any]:
    """Measure the frequency crop and its share of a training step."""
    device = choose_device(config.device)
    images = torch.randn(config.batch, 3, 224, 224, device=device)
    builders: dict[str, Callable[[], object]] = {}
    for bandwidth in BANDWIDTHS:
        for precision in config.precisions:
            builders[f"step, {precision}, {bandwidth}"] = training_step(
                ModelConfig(config.encoder), config.batch, bandwidth, precision, device
            )
        builders[f"crop, {bandwidth}"] = partial(crop, images, bandwidth)
    speeds = interleave(builders, config.rounds)
    shares: dict[str, Any] = {}
    rows = []
    for bandwidth in BANDWIDTHS:
        cropped = speeds[f"crop, {bandwidth}"]
        share = {}
        for precision in config.precisions:
            steps = speeds[f"step, {precision}, {bandwidth}"].seconds
            share[precision] = median(a / b for a, b in zip(cropped.seconds, steps, strict=True))
        each = f"{1000 * cropped.median_seconds / config.batch:.3f} ms/image"
        rows.append([str(bandwidth), each, *(f"{value:.2%}" for value in share.values())])
        shares[str(bandwidth)] = share
    shares_of = [f"share of a step, {precision}" for precision in config.precisions]
    print(markdown_table(["B", "crop", *shares_of], rows))
    return shares


def crop(images: torch.Tensor, bandwidth: int) -> None:
    """Crop images and synchronise."""
    low_frequency_crop(images, bandwidth)
    wait(images.device)


def peak(build: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Return the peak memory in bytes of building an arm and two steps, in a separate process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (build, device))


def _peak(build: Callable[[], Callable[[], object]], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.init()  # required to reset the peak
    before = peak_memory(device)  # on a CPU, that of Python and torch
    step = build()
    step()
    step()
    return peak_memory(device) - before
