"""Read the speeds of GPUs and loader cores from options, finished runs and `mae-et bench node`."""

import json
import re
from pathlib import Path
from typing import Any

from mae_et.config.commands import PlanConfig
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.throughput import POWERS, throughput_model
from mae_et.errors import UserError
from mae_et.io.plain_files import read_bytes


def read_node(text: str) -> dict[str, Any] | None:
    """Return the contents of a `mae-et bench node` file; None for anything else."""
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

    A run's speed at a bandwidth is averaged over the time of its stages, for all its GPUs together.

    Raises:
        UserError: the text is neither of the two.
    """
    import yaml

    from mae_et.config.plain_yaml import parse_yaml

    images: dict[int, float] = {}
    seconds: dict[int, float] = {}
    try:
        if text.lstrip().startswith("{"):
            return {int(bandwidth): float(speed) for bandwidth, speed in parse_yaml(text).items()}
        path = Path(text, "results.json") if Path(text).is_dir() else Path(text)
        for stage in json.loads(read_bytes(path))["stages"]:
            bandwidth = stage["bandwidth"]
            images[bandwidth] = images.get(bandwidth, 0) + stage["images"]
            taken = stage["images"] / stage["images_per_second"]
            seconds[bandwidth] = seconds.get(bandwidth, 0) + taken
        return {bandwidth: images[bandwidth] / seconds[bandwidth] for bandwidth in images}
    except (yaml.YAMLError, OSError, ValueError, LookupError, TypeError, AttributeError,
            ArithmeticError, RecursionError):  # fmt: skip
        raise UserError(
            f"{option} must read like '{{96: 5200}}', or name a finished run's folder (with "
            f"results.json), got {text!r}"
        ) from None


def throughput_from_options(plan: Plan, options: PlanConfig) -> dict[str, Any] | None:
    """Return `throughput_model` for the options of `mae-et plan`; None if `throughput` is not set.

    A file of `mae-et bench node` also provides the loader's speeds.

    Raises:
        UserError: an option is malformed, or requires `throughput`.
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
    replay = options.data.replay
    if options.loader is not None and not options.loader.lstrip().startswith("{"):
        replay = None  # a run's images/s count each use of an image
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
    return throughput_model(plan, trained, gpus, loader, cores, exchange_included, replay)
