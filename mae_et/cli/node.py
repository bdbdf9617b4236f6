"""`mae-et bench node`: what a recipe takes on this machine."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from mae_et.cli.arguments import Arguments
from mae_et.cli.output import print_json
from mae_et.cli.planning import count_images
from mae_et.config.files import add_config_arguments, parse_config
from mae_et.config.schema import PretrainConfig
from mae_et.errors import require
from mae_et.io.atomic import write_text_atomically


def bench_node(arguments: Arguments) -> None:
    """Measure this machine for a pre-training recipe: its speeds, its hours, what limits it."""
    config, options = parse_node(arguments)
    from mae_et.benchmarks.node import bench_node
    from mae_et.benchmarks.node_tables import node_tables

    save: Path | None = options["save"]

    def write(figures: dict[str, Any]) -> None:
        if save is not None:
            write_text_atomically(save, json.dumps(figures, indent=1))

    images = count_images(config) if options["images"] is None else options["images"]
    figures = bench_node(config, images, options["seconds"], write)
    if options["json"]:
        print_json(figures)
    else:
        print(node_tables(figures), flush=True)


def parse_node(arguments: Arguments) -> tuple[PretrainConfig, dict[str, Any]]:
    """Return the recipe and the options of `mae-et bench node`."""
    parser = ArgumentParser(
        prog="mae-et bench node",
        exit_on_error=False,
        description="Measure this machine for a pre-training recipe: images/s of training and "
        "loading, the exchange between GPUs, a checkpoint; then its hours, and what limits it.",
    )
    add_config_arguments(parser, PretrainConfig)
    add = parser.add_argument
    add("--json", action="store_true", help="print one line of JSON instead of tables")
    add("--save", type=Path, default=None, help="JSON file, also for plan --throughput FILE")
    add("--seconds", type=float, default=180.0, help="bound of the measurement")
    add("--images", type=int, default=None, help="images of an epoch, if the dataset is elsewhere")
    config, options = parse_config(parser, PretrainConfig, arguments)
    require(0 < options["seconds"] <= 86_400, "--seconds must lie in (0, 86400]")
    require(options["images"] is None or options["images"] > 0, "--images must be positive")
    return config, options
