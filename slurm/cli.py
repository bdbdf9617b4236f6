"""`mae-et submit` and `mae-et status`."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import sys
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from mae_et.config.files import HelpFormatter, load_config
from mae_et.config.refusals import one_sentence
from mae_et.config.shipped import find_config, shipped_configs, suggest_config
from mae_et.config.suggestions import suggest_key
from mae_et.config.words import expand_path
from mae_et.errors import UserError, require_in
from mae_et.runtime.console import say
from slurm.command import KINDS, CommandLine
from slurm.config import ClusterConfig
from slurm.run_status import status
from slurm.status_table import table, watch
from slurm.submission import submit

USAGE = """usage: mae-et submit COMMAND [--cluster FILE_OR_NAME] [--KEY value ...] [arguments]

  --cluster FILE_OR_NAME  cluster config: a YAML file or a shipped one (cpu, ...);
                          default: that of the variable MAE_ET_CLUSTER, if set
  --then KIND[=RECIPE]    follow-up on its checkpoint: linear-probe, knn, evaluate,
                          finetune=my_recipe.yaml; several with commas
  --sweep KEY=A,B,...     one run per value, as a job array, and a final table;
                          repeatable
  --dry-run               check, print the script and the config, submit nothing

Other flags go to COMMAND, one of {kinds}.
Keys of the cluster config, which flags override:

"""


def submit_command(command_line: CommandLine, arguments: list[str]) -> None:
    """Submit a command line, and print the jobs as one line of JSON."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE.format(kinds=", ".join(KINDS)) + _keys())
        sys.exit(0 if arguments else 2)
    kind, rest = arguments[0], arguments[1:]
    try:
        given, others = _parser().parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    keys = [f"--{key}={value}" for key in _cluster_keys() for value in getattr(given, key)]
    default = os.environ.get("MAE_ET_CLUSTER")
    if default and not given.cluster:
        say(f"cluster: {default} (MAE_ET_CLUSTER)")
        given.cluster = [default]
    cluster = load_config(ClusterConfig, [_cluster_file(name) for name in given.cluster], keys)
    then = [words for text in given.then for words in text.split(",")]
    try:
        jobs = submit(command_line, kind, others, cluster, then, given.sweep, given.dry_run)
    except UserError as error:
        unknown = re.fullmatch(r"there is no flag (--\S+)", str(error))
        if unknown is None:
            raise
        own = [f"--{name}" for name in ("cluster", "then", "sweep", "dry-run", *_cluster_keys())]
        raise UserError(
            f"{error}{suggest_key(unknown[1], own)}; --extra '{{NAME: VALUE}}' takes any option of "
            "sbatch"
        ) from None
    if given.dry_run:
        return
    run = shlex.quote(jobs["run"])
    say(f"to follow it: mae-et status {run} --watch 10")
    print(json.dumps(jobs), flush=True)


def status_command(arguments: list[str]) -> None:
    """Print the status of runs, once or repeatedly."""
    parser = ArgumentParser(
        prog="mae-et status",
        exit_on_error=False,
        description="Show the state of runs.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of runs")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=10.0,
        help="refresh every WATCH seconds (default 10) until every run has ended",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    try:
        config = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(one_sentence(error)) from None
    paths = [expand_path(path, "run") for path in config.runs]
    require_in("(0, 1e6]", config, "watch")
    if config.watch is not None:
        watch(paths, config.watch)
    elif config.json:
        print(json.dumps([dataclasses.asdict(each) for each in status(paths)]), flush=True)
    else:
        print(table(status(paths)), flush=True)


def _parser() -> argparse.ArgumentParser:
    """Return the parser of submit's own flags and the cluster's; it ignores the command's flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("cluster", "then", "sweep"):
        parser.add_argument(f"--{name}", action="append", default=[])
    parser.add_argument("--dry-run", "--dry_run", action="store_true")
    for key in _cluster_keys():
        names = {f"--{key}", f"--{key.replace('_', '-')}"}
        parser.add_argument(*names, dest=key, action="append", default=[])
    return parser


def _cluster_keys() -> list[str]:
    return [field.name for field in dataclasses.fields(ClusterConfig)]


def cluster_of(name: str) -> ClusterConfig:
    """Load a cluster config by path, or a shipped one by name."""
    return load_config(ClusterConfig, [_cluster_file(name)])


def _cluster_file(name: str) -> Path:
    """Find a cluster config by path, or a shipped one by name."""
    for full in (name, f"cluster/{name}"):
        with contextlib.suppress(UserError):
            return find_config(full)
    known = sorted(path.stem for path in (shipped_configs() / "cluster").glob("*.yaml"))
    meant = suggest_config(name, [*map(str, Path().glob("*.y*ml")), *known])
    shipped = f"; shipped clusters: {', '.join(known)}"
    raise UserError(f"there is no cluster {name!r}{meant or shipped}")


def _keys() -> str:
    parser = ArgumentParser(add_help=False, usage=argparse.SUPPRESS, formatter_class=HelpFormatter)
    parser.add_class_arguments(ClusterConfig, fail_untyped=True)
    return parser.format_help()
