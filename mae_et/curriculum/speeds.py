"""Read the speeds of GPUs and loader cores from options, finished runs and `mae-et bench node`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mae_et.config.commands import PlanOptions
from mae_et.curriculum.gpu_speed import GpuSpeed
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.throughput import POWERS, throughput_model
from mae_et.errors import UserError
from mae_et.io.plain_files import read_bytes

Parsed = TypeVar("Parsed")


def read_node(text: str) -> dict[str, Any] | None:
    """Return the contents of a `mae-et bench node` file; None for anything else."""
    try:
        found = json.loads(read_bytes(Path(text)))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "passes" in found else None


def _speeds_of_node(
    node: dict[str, Any], key: str, file: str, parse: Callable[[Any], Parsed]
) -> dict[int, Parsed] | None:
    """Read images/s by bandwidth; None if the file has null."""
    if node.get(key) is None:
        return None
    try:
        return {int(bandwidth): parse(speed) for bandwidth, speed in node[key].items()}
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"--throughput: {file} has no images/s by bandwidth in {key!r}") from None


def by_images(speed: Any) -> dict[int, float]:
    """Read images/s by images of a micro-batch; a single speed is that of any number."""
    if isinstance(speed, dict):
        return {int(images): float(each) for images, each in speed.items()}
    return {1: float(speed)}


def read_speeds(text: str, option: str, parse: Callable[[Any], Parsed]) -> dict[int, Parsed]:
    """Read images/s by bandwidth from '{96: 5200, 224: 1200}' or a finished run's folder.

    A run's speed at a bandwidth is averaged over the time of its stages, for all its GPUs together.
    `parse` reads the speed of a bandwidth.
    """
    import yaml

    from mae_et.config.plain_yaml import parse_yaml

    images: dict[int, float] = {}
    seconds: dict[int, float] = {}
    try:
        if text.lstrip().startswith("{"):
            return {int(bandwidth): parse(speed) for bandwidth, speed in parse_yaml(text).items()}
        path = Path(text, "results.json") if Path(text).is_dir() else Path(text)
        for stage in json.loads(read_bytes(path))["stages"]:
            bandwidth = stage["bandwidth"]
            images[bandwidth] = images.get(bandwidth, 0) + stage["images"]
            taken = stage["images"] / stage["images_per_second"]
            seconds[bandwidth] = seconds.get(bandwidth, 0) + taken
        return {bandwidth: parse(images[bandwidth] / seconds[bandwidth]) for bandwidth in images}
    except (yaml.YAMLError, OSError, ValueError, LookupError, TypeError, AttributeError,
            ArithmeticError, RecursionError):  # fmt: skip
        raise UserError(
            f"{option} must read like '{{96: 5200}}', or name a finished run's folder (with "
            f"results.json), got {text!r}"
        ) from None


def throughput_from_options(
    plan: Plan, options: PlanOptions, replay: dict[int, int] | None
) -> dict[str, Any] | None:
    """Return `throughput_model` for the options of `mae-et plan`; None without `throughput`.

    `replay` is the run's `data.replay`. A file of `mae-et bench node` also provides the loader's
    speeds.
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
    loader = None if options.loader is None else read_speeds(options.loader, "--loader", float)
    if options.loader is not None and not options.loader.lstrip().startswith("{"):
        replay = None  # a run's images/s count each use of an image
    cores, file = options.cores_per_gpu, options.throughput
    node = read_node(file)
    if node is None:
        speed = GpuSpeed(read_speeds(file, "--throughput", by_images))
    else:
        speed = GpuSpeed(
            _speeds_of_node(node, "passes", file, by_images) or {},
            _speeds_of_node(node, "decoded_images_per_second", file, float),
            node.get("exchange"),
        )
        if loader is None:
            loader = _speeds_of_node(node, "loader_images_per_second", file, float)
            cores = cores or (node.get("cores_per_gpu") if loader else None)
    return throughput_model(plan, speed, gpus, loader, cores, replay)
