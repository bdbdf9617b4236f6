"""Completion of commands, keys and choices in a shell."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mae_et.cli.arguments import Arguments, parser_of
from mae_et.cli.bench import NAMES
from mae_et.cli.command import Command
from mae_et.cli.help import help_requested
from mae_et.errors import UserError
from slurm.command import BENCH, KINDS
from slurm.config import ClusterConfig


def completion(arguments: Arguments) -> None:
    """Print a completion script for bash or zsh."""
    import shtab

    from mae_et.cli.commands import COMMANDS, SUBCOMMANDS  # which import this module

    shells = ("bash", "zsh")
    if help_requested(arguments):
        print("usage: mae-et completion bash | zsh\n\nsource <(mae-et completion bash)")
        sys.exit(0)
    if len(arguments) != 1 or arguments[0] not in shells:
        raise UserError(f"completion needs one of {', '.join(shells)}, got {' '.join(arguments)!r}")
    print(shtab.complete(_parser(COMMANDS, SUBCOMMANDS), shell=arguments[0]))


def _parser(
    commands: Mapping[str, Command], subcommands: Mapping[str, Command]
) -> argparse.ArgumentParser:
    """Return a parser of every command and its keys, with the standard actions that shtab reads."""
    parser = argparse.ArgumentParser(prog="mae-et")
    parsers = parser.add_subparsers()
    for name, command in commands.items():
        one = _add_command(parsers, name, command.about, command)
        if name == "bench":
            benchmarks = one.add_subparsers()
            for kind in NAMES:
                _add_command(benchmarks, kind, kind, subcommands.get(f"bench {kind}"))
        elif name == "submit":
            kinds = one.add_subparsers()
            for kind in KINDS:
                row = subcommands["bench node"] if kind == BENCH else commands[kind]
                job = _add_command(kinds, kind, kind, row)
                if kind == BENCH:
                    job.add_argument("name", choices=["node"])
                else:
                    _add_paths(job)
                job.add_argument("--dry-run", action="store_true", help=kind)
                for flag in ("then", "sweep"):
                    job.add_argument(f"--{flag}", help=kind)
                _add_key(job, ["--cluster"], Path, kind)
                for key, inner in get_type_hints(ClusterConfig).items():
                    _add_key(job, [f"--{key}"], inner, kind)
        else:
            _add_paths(one)
    return parser


def _add_command(
    parsers: Any, name: str, about: str, command: Command | None
) -> argparse.ArgumentParser:
    """Add a command with the keys of its config, if it has one."""
    one: argparse.ArgumentParser = parsers.add_parser(name, help=about)  # else shtab skips it
    for action in parser_of(command)._actions if command and command.config else []:
        shown = action.dest.rpartition(".")[2] not in {"help", "print_config"}
        if action.option_strings and shown:
            kind = Path if action.dest == "config" else getattr(action, "_typehint", None)
            _add_key(one, action.option_strings, kind, name)
    return one


def _add_paths(parser: argparse.ArgumentParser) -> None:
    """Complete words that are no flags as paths, such as those of runs."""
    import shtab

    parser.add_argument("paths", nargs="*").complete = shtab.FILE  # type: ignore[attr-defined]


def _add_key(parser: argparse.ArgumentParser, flags: Sequence[str], kind: Any, about: str) -> None:
    """Add a key of some type, and the keys of a section that may be absent."""
    import shtab

    action = parser.add_argument(*flags, choices=_choices(kind), help=about)
    kinds = kind, *get_args(kind)
    if Path in kinds:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    for section in filter(is_dataclass, kinds if NoneType in kinds else ()):
        for key, inner in get_type_hints(section).items():
            _add_key(parser, [f"{flags[0]}.{key}"], inner, about)


def _choices(kind: Any) -> list[str] | None:
    """Return the choices of a type; None if it allows other values."""
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if get_origin(kind) not in {Union, UnionType}:
        return None
    parts = [_choices(part) for part in get_args(kind) if part is not NoneType]
    return None if None in parts else [value for part in parts for value in part or ()]
