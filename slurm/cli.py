"""`mae-et submit` and `mae-et status`."""

import contextlib
import dataclasses
import json
import shlex
import sys
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from mae_et.config.files import (
    add_config_arguments,
    find_config,
    load_config,
    one_sentence,
    shipped_configs,
)
from mae_et.errors import UserError
from slurm.command import KINDS, CommandLine
from slurm.config import ClusterConfig
from slurm.run_status import as_dicts, status, table, watch
from slurm.submission import submit

USAGE = """usage: mae-et submit COMMAND [--cluster FILE_OR_NAME] [--KEY value ...] [arguments]

  --cluster FILE_OR_NAME   where it runs: a YAML file, or a shipped one (node_8gpu, cpu, ...)
  --then KIND[=RECIPE],... what starts from its checkpoint once it has succeeded
                           (linear-probe, knn, finetune=my_recipe.yaml; evaluate after finetune)
  --sweep KEY=A,B,...      a run for each value, as one array, and a table at the end; repeatable
  --dry-run                check, print the script and the resolved config, submit nothing

What is not a key of the cluster goes to COMMAND: {kinds}.
Keys of the cluster (in the file, or as flags over it):
"""


def submit_command(command_line: CommandLine, arguments: list[str]) -> None:
    """Submit what a command line says, and print the jobs as one line of JSON."""
    kinds = ", ".join(kind for kind in KINDS if kind != "compare")
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE.format(kinds=kinds) + _keys())
        sys.exit(0 if arguments else 2)
    kind, rest = arguments[0], arguments[1:]
    own, others = _split(rest)
    options: dict[str, list[str]] = {"cluster": [], "then": [], "sweep": [], "dry_run": []}
    flags = []
    for name, value in own:
        if name in options:
            options[name].append(value)
        else:
            flags.append(f"--{name}={value}")
    cluster = load_config(
        ClusterConfig, [_cluster_file(name) for name in options["cluster"]], flags
    )
    then = [word for words in options["then"] for word in words.split(",")]
    dry_run = bool(options["dry_run"])
    jobs = submit(command_line, kind, others, cluster, then, options["sweep"], dry_run)
    if dry_run:
        return
    run = shlex.quote(jobs["run"])
    print(f"mae-et: look at it with: mae-et status {run} --watch 10", file=sys.stderr)
    print(json.dumps(jobs), flush=True)


def status_command(arguments: list[str]) -> None:
    """Print the state of runs, once, or again and again."""
    parser = ArgumentParser(
        prog="mae-et status", exit_on_error=False, description="Tell how runs are."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of runs")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=10.0,
        help="seconds between two looks (10 by default), until every run has ended",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    try:
        config = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(one_sentence(error)) from None
    paths = config.runs
    if config.watch is not None:
        watch(paths, config.watch)
    elif config.json:
        print(json.dumps(as_dicts(status(paths))), flush=True)
    else:
        print(table(status(paths)), flush=True)


def _split(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Tell the arguments of submitting, as names and values, from those of the command.

    Raises:
        UserError: a value is missing.
    """
    names = {field.name for field in dataclasses.fields(ClusterConfig)}
    names |= {"cluster", "then", "sweep", "dry_run"}
    own, others = [], []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name not in names:
            others.append(word)
        elif name == "dry_run":
            own.append((name, "true"))
        elif equals:
            own.append((name, value))
        else:
            following = next(words, None)
            if following is None:
                raise UserError(f"{word} needs a value")
            own.append((name, following))
    return own, others


def cluster_of(name: str) -> ClusterConfig:
    """Return the cluster of a file, or a shipped one by its name.

    Raises:
        UserError: there is none.
    """
    return load_config(ClusterConfig, [_cluster_file(name)])


def _cluster_file(name: str) -> Path:
    """Find a cluster's file by its path, or among the shipped ones by its name alone.

    Raises:
        UserError: there is none.
    """
    for full in (name, f"cluster/{name}"):
        with contextlib.suppress(UserError):
            return find_config(full)
    known = sorted(path.stem for path in (shipped_configs() / "cluster").glob("*.yaml"))
    raise UserError(f"there is no cluster {name!r}; shipped ones: {', '.join(known)}")


def _keys() -> str:
    parser = ArgumentParser(add_help=False, usage="")
    add_config_arguments(parser, ClusterConfig)
    return parser.format_help()
