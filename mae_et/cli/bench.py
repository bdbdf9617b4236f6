"""`mae-et bench`: measure a recipe on this machine, and benchmark mae-et itself."""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from typing import Any

from jsonargparse import ArgumentParser

from mae_et.cli.arguments import Arguments
from mae_et.cli.output import print_json, split_json_flag
from mae_et.cli.planning import count_images
from mae_et.config.commands import NodeConfig
from mae_et.config.files import add_config_arguments, parse_config
from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.io.lock import check_writable
from mae_et.io.plain_files import check_replaceable

NAMES = ("node", "step", "launches", "loader", "crop", "quality", "run")


def bench(arguments: Arguments) -> None:
    """Measure speeds: node, step, launches, loader, crop, quality, run."""
    from mae_et.benchmarks.command import BENCHMARKS

    if arguments[:1] in (["-h"], ["--help"]):
        starts = {"node": bench_node} | {name: start for name, (_, start) in BENCHMARKS.items()}
        for name, start in starts.items():
            print(f"  {name:<10}{(start.__doc__ or '').splitlines()[0]}")
        print("\nmae-et bench NAME --help lists its keys.")
        sys.exit(0)
    if not arguments or arguments[0] not in NAMES:
        raise UserError(f"bench needs one of {', '.join(NAMES)}")
    kind, measure = BENCHMARKS[arguments[0]]
    description = (kind.__doc__ or "").strip()
    parser = ArgumentParser(
        prog=f"mae-et bench {arguments[0]}", exit_on_error=False, description=description
    )
    add_config_arguments(parser, kind)
    words, as_json = split_json_flag(arguments[1:])
    config = parse_config(parser, kind, words)
    # A benchmark prints its table itself.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        results = measure(config)
    if as_json:
        print_json(results)


def bench_node(config: NodeConfig) -> None:
    """Measure this machine for a pre-training recipe: its speeds, its hours, what limits it."""
    from mae_et.benchmarks.node import bench_node
    from mae_et.benchmarks.node_tables import node_tables
    from mae_et.benchmarks.node_training import checkpoint_folder

    if config.save is not None:
        check_replaceable(config.save, r'\{\s*"machine"', "save")
        check_writable(config.save.parent)
    check_writable(checkpoint_folder(config))

    def write(figures: dict[str, Any]) -> None:
        if config.save is not None:
            write_text_atomically(config.save, json.dumps(figures, indent=1))

    images = config.images or count_images(config)
    figures = bench_node(config, images, config.seconds, write)
    if config.json:
        print_json(figures)
    else:
        print(node_tables(figures), flush=True)
