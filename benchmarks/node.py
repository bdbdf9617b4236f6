"""Measure a recipe on this machine: its speeds, its hours, and its bottleneck.

    mae-et bench node --config pretrain/vit_b16_etpp_hog_400ep --data.root FOLDER [--seconds 180]

Measured in turn, each within its share of the time: training at each bandwidth on one GPU (eager
and compiled, two micro-batches), every way of loading on all GPUs at once, the exchange of
gradients between them, and a checkpoint. Hours are computed from these
(`mae_et/curriculum/throughput.py`), assuming that a run proceeds at the slower speed of training
and loading. The two are measured separately, except that decoding on the GPU is timed during
training. On a GPU, passes are replayed as CUDA graphs, after which gradients are exchanged.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.gpu_speed import GpuSpeed, speed_of_step
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.throughput import throughput_model
from mae_et.data.cores import MAX_WORKERS
from mae_et.runtime.console import say
from mae_et.runtime.distributed import DistributedContext, choose_device
from mae_et.runtime.placement import own_cores
from mae_et.training.plan import make_plan

from .node_exchange import exchange_speed
from .node_loading import GPU_DECODES, loading_speeds
from .node_training import checkpoint_seconds, training_speeds

TRAINING_SHARE, LOADING_SHARE = 0.5, 0.35
Rows = list[dict[str, Any]]


def bench_node(
    config: PretrainConfig,
    images: int,
    seconds: float = 180,
    write: Callable[[dict[str, Any]], None] = lambda figures: None,
) -> dict[str, Any]:
    """Measure this machine for a recipe, and compute the recipe's hours.

    Args:
        config: the recipe.
        images: images of an epoch.
        seconds: total time limit; parts that do not fit are reported as not measured.
        write: called after each part with the figures so far, so that none is lost.

    Returns:
        JSON-serialisable figures; `mae-et plan --throughput` reads them.
    """
    started = time.monotonic()
    device = choose_device(config.efficiency.device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    plan = make_plan(config, images)
    cores = own_cores(DistributedContext(0, 1, device))
    workers = config.efficiency.num_workers or max(1, cores // gpus)
    figures: dict[str, Any] = {"machine": machine(device, gpus, workers), "date": f"{date.today()}"}

    def part(name: str, measure: Callable[[], Any]) -> None:
        say(f"bench node: {name} ({time.monotonic() - started:.0f} s so far)")
        figures[name] = measure()
        write(figures)

    # The short measurements first; the rest of the time is for speeds.
    part("exchange", lambda: exchange_speed(config, device, gpus))
    part("checkpoint", lambda: checkpoint_seconds(config, device))
    left = max(0.0, seconds - (time.monotonic() - started))
    part("training", lambda: training_speeds(config, plan, device, gpus, left * TRAINING_SHARE))
    part(
        "loading",
        lambda: loading_speeds(config, plan, device, workers, left * LOADING_SHARE, gpus),
    )
    figures |= summary(plan, figures, gpus, workers, config.data.replay)
    figures["seconds"] = round(time.monotonic() - started, 1)
    write(figures)
    return figures


def machine(device: torch.device, gpus: int, workers: int) -> dict[str, Any]:
    """Describe the machine and the software that were measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "gpus": gpus if device.type == "cuda" else 0,
        "cores": os.cpu_count(),
        "loader_processes_per_gpu": workers,
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def summary(
    plan: Plan, figures: dict[str, Any], gpus: int, workers: int,
    replay: Mapping[int, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the best speeds, the hours with each way of loading, and the fastest flags.

    `time_against_constant` assumes that loading keeps up; that of `throughput` does not. `passes`,
    `decoded_images_per_second`, `loader_images_per_second` and `exchange` are what `mae-et plan`
    computes other numbers of GPUs from.
    """
    training, loading, exchange = (figures[name] for name in ("training", "loading", "exchange"))
    bandwidths = plan.bandwidths
    compiled = fastest_compile(training, bandwidths, plan.batch_size // gpus)
    passes = passes_of(training, compiled)
    if passes.keys() != set(bandwidths):
        alone = GpuSpeed(passes, exchange=exchange).among(gpus, plan)
        return {"images_per_second": {str(b): speed for b, speed in alone.items()}}
    models: dict[str, dict[str, Any]] = {}
    flags = {row["way"]: row["flags"] for row in loading}
    for way in flags:
        speeds = loaded_speeds(loading, way, bandwidths)
        if speeds is None:
            continue
        # Decoding on the GPU shares it with training, so more cores do not help.
        by_gpu = GPU_DECODES in flags[way]
        speed = GpuSpeed(passes, speeds if by_gpu else None, exchange)
        cores = None if by_gpu else {b: each / workers for b, each in speeds.items()}
        models[way] = _model(plan, speed, gpus, cores, workers, replay)
    trained_alone = _model(plan, GpuSpeed(passes, exchange=exchange), gpus)
    found: dict[str, Any] = {
        "passes": {str(b): {str(n): s for n, s in sizes.items()} for b, sizes in passes.items()},
        "time_against_constant": trained_alone["time_against_constant"],
    }
    if not models:
        return {**trained_alone["given"], **found, "throughput": trained_alone}
    hours = {way: _hours(model, gpus) for way, model in models.items()}
    best = min(hours, key=lambda way: hours[way])
    more = [f"--efficiency.num_workers={workers}"] if workers > MAX_WORKERS else []
    return {
        **models[best]["given"],
        **found,
        "hours_by_way": hours,
        "fastest": {
            "way": best,
            "flags": [f"--efficiency.compile={str(compiled).lower()}", *flags[best], *more],
        },
        "throughput": models[best],
    }


def fastest_compile(training: Rows, bandwidths: list[int], share: int) -> bool:
    """Return whether compiled blocks are faster over all bandwidths; False if not measured."""
    passes = [passes_of(training, kind) for kind in (False, True)]
    if any(each.keys() != set(bandwidths) for each in passes):
        return False
    eager, compiled = (
        sum(1 / speed_of_step(sizes, share) for sizes in each.values()) for each in passes
    )
    return compiled < eager


def passes_of(training: Rows, compiled: bool) -> dict[int, dict[int, float]]:
    """Return the images/s that were measured, by bandwidth and micro-batch, without noisy ones."""
    found: dict[int, dict[int, float]] = {}
    for row in training:
        if row["compiled"] is compiled and row["seconds"] and not row.get("noisy"):
            speed = row["micro_batch"] / row["seconds"]
            found.setdefault(row["bandwidth"], {})[row["micro_batch"]] = speed
    return found


def loaded_speeds(loading: Rows, way: str, bandwidths: list[int]) -> dict[int, float] | None:
    """Return a way's images/s at each bandwidth; None if one was not measured."""
    speeds = {row["bandwidth"]: row["images_per_second"] for row in loading if row["way"] == way}
    if None in speeds:  # the same at every bandwidth
        speeds = dict.fromkeys(bandwidths, speeds[None])
    found = {b: speeds[b] for b in bandwidths if speeds.get(b)}
    return found if len(found) == len(bandwidths) else None


def _model(
    plan: Plan, speed: GpuSpeed, gpus: int, loader: dict[int, float] | None = None,
    workers: int = 0, replay: Mapping[int, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the throughput model of this machine's GPUs, with the totals of other numbers."""
    cores = None if loader is None else float(workers)

    def model(numbers: tuple[int, ...]) -> dict[str, Any]:
        return throughput_model(plan, speed, numbers, loader, cores, replay)

    return model((gpus,)) | {"totals": model(tuple({1, 2, 4, 8, gpus}))["totals"]}


def _hours(model: dict[str, Any], gpus: int) -> float:
    found = next(row["hours"] for row in model["totals"] if row["gpus"] == gpus)
    return float("inf") if found is None else found
