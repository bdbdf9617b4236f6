"""Compute the hours of a plan on many GPUs from speeds measured on one.

Pure arithmetic: speeds of GPUs and loader cores add up. Checkpointing and disks take no time in
this model, nor does the exchange of gradients, unless the speeds include it, so the hours are a
lower bound.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_et.config.commands import PlanConfig
from mae_et.curriculum.plan import Plan
from mae_et.errors import UserError
from mae_et.io.plain_files import read_bytes

POWERS = tuple(2**power for power in range(11))
"""Default GPU counts of the table: 1 ... 1024."""


def throughput_model(
    plan: Plan,
    images_per_second: Mapping[int, float],
    gpus: tuple[int, ...] = POWERS,
    loader: Mapping[int, float] | None = None,
    cores_per_gpu: float | None = None,
    exchange_included: bool = False,
) -> dict[str, Any]:
    """Return a plan's hours for each number of GPUs, and the loader cores it needs.

    Args:
        plan: the plan.
        images_per_second: measured training images/s of one GPU, by bandwidth.
        gpus: numbers of GPUs.
        loader: measured images/s of one loader core, by bandwidth.
        cores_per_gpu: loader cores per GPU; a stage is as fast as the slower of GPU and loader.
        exchange_included: whether `images_per_second` counts the exchange of gradients.

    Returns:
        JSON-serialisable types: `given`, `loading` by bandwidth, `totals` by number of GPUs.

    Raises:
        UserError: a bandwidth is missing, a speed or number is not positive, or `cores_per_gpu` is
            given without `loader`.
    """
    bandwidths = plan.bandwidths
    _check_speeds("--throughput", images_per_second, bandwidths)
    if loader is not None:
        _check_speeds("--loader", loader, bandwidths)
    _check_counts(gpus, cores_per_gpu, loader is not None)
    loading = [_loading(b, images_per_second[b], loader, cores_per_gpu) for b in bandwidths]
    speed = {row["bandwidth"]: row["reached_images_per_second"] for row in loading}
    one = math.fsum(stage.steps * plan.batch_size / speed[stage.bandwidth] for stage in plan.stages)
    # The images at full bandwidth that the same compute pays for.
    constant = plan.compute / plan.base_cost / speed[plan.base] if plan.base in speed else None
    return {
        "given": {
            "images_per_second": {str(b): images_per_second[b] for b in bandwidths},
            "loader_images_per_second": (
                None if loader is None else {str(b): loader[b] for b in bandwidths}
            ),
            "cores_per_gpu": cores_per_gpu,
            "exchange_included": exchange_included,
        },
        "loading": loading,
        "totals": [_total(count, plan.batch_size, one, constant) for count in sorted(set(gpus))],
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
    """Return the hours on a number of GPUs, None if it does not divide the batch."""
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


def read_node(text: str) -> dict[str, Any] | None:
    """Return the figures of a file of `mae-et bench node`; None for anything else."""
    try:
        found = json.loads(read_bytes(Path(text)))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "images_per_second" in found else None


def _speeds_of_node(node: dict[str, Any], key: str, file: str) -> dict[int, float]:
    try:
        return {int(bandwidth): float(speed) for bandwidth, speed in node[key].items()}
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"--throughput: {file} has no images/s by bandwidth in {key!r}") from None


def read_speeds(text: str, option: str) -> dict[int, float]:
    """Read images/s by bandwidth from '{96: 5200, 224: 1200}' or a finished run's folder.

    The speed of a run at a bandwidth is averaged over the time of its stages, and is that of all
    its GPUs together.

    Raises:
        UserError: the text is neither.
    """
    if text.lstrip().startswith("{"):
        import yaml

        from mae_et.config.plain_yaml import parse_yaml

        try:
            pairs = parse_yaml(text)
            return {int(bandwidth): float(speed) for bandwidth, speed in pairs.items()}
        except (yaml.YAMLError, TypeError, ValueError, AttributeError):
            raise UserError(f"{option} must read like '{{96: 5200}}', got {text!r}") from None
    path = Path(text, "results.json") if Path(text).is_dir() else Path(text)
    images: dict[int, float] = {}
    seconds: dict[int, float] = {}
    try:
        for stage in json.loads(read_bytes(path))["stages"]:
            bandwidth = stage["bandwidth"]
            images[bandwidth] = images.get(bandwidth, 0) + stage["images"]
            taken = stage["images"] / stage["images_per_second"]
            seconds[bandwidth] = seconds.get(bandwidth, 0) + taken
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        raise UserError(
            f"{option} must read like '{{96: 5200}}', or name a finished run's folder (with "
            f"results.json), got {text!r}"
        ) from None
    return {bandwidth: images[bandwidth] / seconds[bandwidth] for bandwidth in images}


def throughput_from_options(plan: Plan, options: PlanConfig) -> dict[str, Any] | None:
    """Return `throughput_model` for the options of `mae-et plan`; None without `throughput`.

    A file of `mae-et bench node` gives the speeds of loading too.

    Raises:
        UserError: an option is malformed, or given without `throughput`.
    """
    if options.throughput is None:
        for name in ("loader", "gpus", "cores_per_gpu"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} requires --throughput")
        return None
    gpus = POWERS
    if options.gpus is not None:
        if not re.fullmatch(r"\[?\s*\d+(\s*,\s*\d+)*\s*\]?", options.gpus.strip()):
            raise UserError(f"--gpus must read like 1,8,64, got {options.gpus!r}")
        gpus = tuple(int(count) for count in re.findall(r"\d+", options.gpus))
    loader = None if options.loader is None else read_speeds(options.loader, "--loader")
    cores, exchange_included = options.cores_per_gpu, False
    node = read_node(options.throughput)
    if node is None:
        trained = read_speeds(options.throughput, "--throughput")
    else:
        trained = _speeds_of_node(node, "images_per_second", options.throughput)
        exchange_included = node.get("exchange_included") is True
        if loader is None and node.get("loader_images_per_second") is not None:
            loader = _speeds_of_node(node, "loader_images_per_second", options.throughput)
            cores = cores or node.get("cores_per_gpu")
    return throughput_model(plan, trained, gpus, loader, cores, exchange_included)


def throughput_table(model: dict[str, Any]) -> str:
    """Format the result of `throughput_model` as two tables: by bandwidth, and by GPUs."""
    cores = model["given"]["cores_per_gpu"]
    given = "given: images/s of one GPU (GPU img/s)"
    if model["given"]["loader_images_per_second"] is not None:
        given += ", of one loader core (core img/s)"
    if cores is not None:
        given += f", {cores:g} loader cores per GPU"
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
        exchange = "" if model["given"]["exchange_included"] else "gradient exchange, "
        lines.append(
            f"\n{model['time_against_constant']:.2f}x the time of the same compute at constant "
            f"bandwidth; hours exclude {exchange}checkpointing and start-up"
        )
    return "\n".join(lines)


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
