"""Compute the hours of a plan on many GPUs from speeds measured on one.

Pure arithmetic: speeds of GPUs and loader cores add up. Checkpointing, disks (beyond what the speed
of loading includes) and, unless the speeds include it, the exchange of gradients take no time in
this model, so the hours are a lower bound.
"""

import math
from collections.abc import Mapping
from typing import Any

from mae_et.curriculum.gpu_speed import GpuSpeed, exchange_seconds
from mae_et.curriculum.plan import Plan
from mae_et.errors import UserError

POWERS = tuple(2**power for power in range(11))
"""Default numbers of GPUs: 1, 2, 4, ..., 1024."""
SLOWED = 1.1
"""Decoding that slows a GPU by more than this factor is its bottleneck."""


def throughput_model(
    plan: Plan,
    speed: GpuSpeed,
    gpus: tuple[int, ...] = POWERS,
    loader: Mapping[int, float] | None = None,
    cores_per_gpu: float | None = None,
    replay: Mapping[int, int] | None = None,
) -> dict[str, Any]:
    """Return a plan's hours for each number of GPUs, and the loader cores it needs.

    Given the images/s of one loader core by bandwidth (`loader`) and the loader cores of a GPU, the
    slower of GPU and loader limits each stage. Each image is used as often as `data.replay` says.

    Returns:
        JSON-serialisable types: `given`, `loading` by bandwidth, `totals` by number of GPUs. All
        but the totals holds for the least number of GPUs.
    """
    _check_counts(gpus, cores_per_gpu, loader is not None)
    if loader is not None:
        _check_speeds("--loader", loader, plan.bandwidths)
    models = [
        _among(n, plan, speed, loader, cores_per_gpu, replay or {}) for n in sorted(set(gpus))
    ]
    return models[0] | {"totals": [row for model in models for row in model["totals"]]}


def _among(
    gpus: int, plan: Plan, speed: GpuSpeed, loader: Mapping[int, float] | None,
    cores: float | None, replay: Mapping[int, int],
) -> dict[str, Any]:  # fmt: skip
    """Return the model of one number of GPUs."""
    bandwidths, images = plan.bandwidths, max(1, plan.batch_size // gpus)
    trained, alone = speed.among(gpus, plan), speed.trained(images)
    _check_speeds("--throughput", trained, bandwidths)
    used = None if loader is None else {b: loader[b] * replay.get(b, 1) for b in bandwidths}
    loading = [_loading(b, trained[b], used, cores) for b in bandwidths]
    for row in loading:
        b = row["bandwidth"]
        if row.get("bottleneck") == "loader":
            continue
        if exchange_seconds(speed.exchange, gpus) * alone[b] >= images:
            row["bottleneck"] = "exchange"  # takes as long as the passes
        elif speed.decoded:
            row["bottleneck"] = "decoding" if SLOWED * speed.decoded[b] < alone[b] else "gpu"
    reached = {row["bandwidth"]: row["reached_images_per_second"] for row in loading}
    one = math.fsum(
        stage.steps * plan.batch_size / reached[stage.bandwidth] for stage in plan.stages
    )
    # The images at full bandwidth that cost the same compute.
    constant = plan.compute / plan.base_cost / reached[plan.base] if plan.base in reached else None
    given: dict[str, Any] = {
        "images_per_second": {str(b): trained[b] for b in bandwidths},
        "loader_images_per_second": (
            None if loader is None else {str(b): loader[b] for b in bandwidths}
        ),
        "cores_per_gpu": cores,
        "exchange_included": "seconds" in (speed.exchange or {}),
        "replay": {str(b): replay[b] for b in bandwidths if replay.get(b, 1) > 1},
    }
    if speed.decoded:
        given["decoded_images_per_second"] = {str(b): s for b, s in speed.decoded.items()}
    if speed.exchange is not None or any(len(sizes) > 1 for sizes in speed.passes.values()):
        given["images_per_gpu_and_step"] = images
    return {
        "given": given,
        "loading": loading,
        "totals": [_total(gpus, plan.batch_size, one, constant)],
        "time_against_constant": None if constant is None else one / constant,
    }


def _loading(
    bandwidth: int, trained: float, loader: Mapping[int, float] | None, cores: float | None
) -> dict[str, Any]:
    """Return one bandwidth's speeds, the cores it needs, and which of GPU and loader is slower."""
    row: dict[str, Any] = {"bandwidth": bandwidth, "images_per_second": trained}
    reached = trained
    if loader is not None:
        row["loader_images_per_second"] = loader[bandwidth]
        row["cores_needed_per_gpu"] = trained / loader[bandwidth]
        if cores is not None:
            loaded = loader[bandwidth] * cores
            reached = min(trained, loaded)
            row["bottleneck"] = "loader" if loaded < trained else "gpu"
    return row | {"reached_images_per_second": reached}


def _total(
    gpus: int, batch_size: int, seconds: float, constant_seconds: float | None
) -> dict[str, Any]:
    """Return the hours on a number of GPUs; None if it does not divide the batch."""
    divides = batch_size % gpus == 0
    hours = seconds / gpus / 3600 if divides else None
    constant = None if constant_seconds is None or not divides else constant_seconds / gpus / 3600
    return {
        "gpus": gpus,
        "images_per_gpu_and_step": batch_size // gpus if divides else None,
        "hours": hours,
        "gpu_hours": None if hours is None else hours * gpus,
        "constant_hours": constant,
    }


def throughput_table(model: dict[str, Any]) -> str:
    """Format the result of `throughput_model` as two tables: by bandwidth, and by GPUs."""
    cores = model["given"]["cores_per_gpu"]
    given, images = "given: images/s of one GPU", model["given"].get("images_per_gpu_and_step")
    given += "" if images is None else f" with {images:,} images a step"
    if model["given"]["loader_images_per_second"] is not None:
        given += ", of one loader core"
    if cores is not None:
        given += f", {cores:g} loader cores per GPU"
    if replay := model["given"].get("replay"):
        given += ", each image used " + ", ".join(f"{n} times at {b}" for b, n in replay.items())
    head = (
        f"{'B':>5} {'GPU img/s':>10} {'core img/s':>11} {'cores/GPU needed':>17} "
        f"{'reached img/s':>14} {'bottleneck':>11}"
    )
    lines = [f"{given}; the rest is computed", "", head]
    for row in model["loading"]:
        loaded, needed = row.get("loader_images_per_second"), row.get("cores_needed_per_gpu")
        lines.append(
            f"{row['bandwidth']:>5} {row['images_per_second']:>10,.0f} "
            f"{'-' if loaded is None else format(loaded, ',.0f'):>11} "
            f"{'-' if needed is None else format(needed, '.1f'):>17} "
            f"{row['reached_images_per_second']:>14,.0f} {row.get('bottleneck', '-'):>11}"
        )
    head = f"{'GPUs':>5} {'images/GPU':>11} {'hours':>10} {'GPU-hours':>10} {'constant, hours':>16}"
    lines += ["", head]
    for row in model["totals"]:
        if row["hours"] is None:
            lines.append(f"{row['gpus']:>5} the batch is not divisible by this number")
            continue
        constant = row["constant_hours"]
        against = "-" if constant is None else f"{constant:,.2f}"
        lines.append(
            f"{row['gpus']:>5} {row['images_per_gpu_and_step']:>11,} {row['hours']:>10,.2f} "
            f"{row['gpu_hours']:>10,.1f} {against:>16}"
        )
    if model["time_against_constant"] is not None:
        lines.append(
            f"\n{model['time_against_constant']:.2f}x the time of the same compute at constant "
            f"bandwidth\nhours exclude {_excluded(model['given'])}"
        )
    return "\n".join(lines)


def _excluded(given: dict[str, Any]) -> str:
    """Return what takes no time in a model."""
    exchange = [] if given["exchange_included"] else ["gradient exchange"]
    loads = given["loader_images_per_second"] or given.get("decoded_images_per_second")
    # Loading is measured from the page cache; a run's own speed includes its storage.
    storage = ["storage slower than the page cache"] if loads else []
    names = [*exchange, "checkpointing", "start-up", *storage]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _check_speeds(option: str, speeds: Mapping[int, float], bandwidths: list[int]) -> None:
    missing = [bandwidth for bandwidth in bandwidths if bandwidth not in speeds]
    if missing:
        raise UserError(
            f"{option} has no speed for bandwidths {missing} of the curriculum, only for "
            f"{sorted(speeds)}"
        )
    if any(not (speed > 0 and math.isfinite(speed)) for speed in speeds.values()):
        raise UserError(f"{option} must be positive images/s, got {dict(speeds)}")


def _check_counts(gpus: tuple[int, ...], cores_per_gpu: float | None, has_loader: bool) -> None:
    if cores_per_gpu is not None and not has_loader:
        raise UserError("--cores-per-gpu needs --loader, the images/s of one loader core")
    if cores_per_gpu is not None and not (cores_per_gpu > 0 and math.isfinite(cores_per_gpu)):
        raise UserError(f"--cores-per-gpu must be positive, got {cores_per_gpu}")
    if not gpus or any(count < 1 for count in gpus):
        raise UserError(f"--gpus must be positive numbers, got {list(gpus)}")
