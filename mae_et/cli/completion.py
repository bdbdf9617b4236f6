"""Completion of commands, keys and choices in a shell."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mae_et.cli.arguments import CONFIGS, Arguments, parser_of
from mae_et.cli.help import help_requested
from mae_et.errors import UserError


def completion(arguments: Arguments) -> None:
    """Print what completes commands, keys and choices in a shell: completion bash | zsh."""
    import shtab

    from mae_et.cli.commands import COMMANDS

    shells = ("bash", "zsh")
    if help_requested(arguments):
        print("usage: mae-et completion bash | zsh\n\nsource <(mae-et completion bash)")
        sys.exit(0)
    if len(arguments) != 1 or arguments[0] not in shells:
        raise UserError(f"completion needs one of {', '.join(shells)}, got {' '.join(arguments)!r}")
    about = {name: (run.__doc__ or name).splitlines()[0] for name, run in COMMANDS.items()}
    print(shtab.complete(_parser(about), shell=arguments[0]))


def _parser(commands: Mapping[str, str]) -> argparse.ArgumentParser:
    """Return a parser of standard actions, as shtab reads them, with every command and its keys."""
    import shtab

    parser = argparse.ArgumentParser(prog="mae-et")
    parsers = parser.add_subparsers()
    for name, about in commands.items():
        one = parsers.add_parser(name, help=about)  # without help, shtab skips it
        for action in parser_of(name)._actions if name in CONFIGS else []:
            if not action.option_strings or action.dest in {"help", "print_config"}:
                continue
            kind = getattr(action, "_typehint", None)
            added = one.add_argument(*action.option_strings, choices=_choices(kind), help=name)
            if action.dest == "config" or Path in (kind, *get_args(kind)):
                added.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


def _choices(kind: Any) -> list[str] | None:
    """Return the values that a type lists; None for others."""
    if kind is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else None
