"""`--help` describes the keys that most runs set; `--help all` every key of a command."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from mae_et.config.keys import marked_keys
from mae_et.config.schema import RunConfig

if TYPE_CHECKING:
    from mae_et.cli.command import Command

MOST_KEYS = 30
"""Commands with at most this many keys describe all of them."""


def help_requested(arguments: Sequence[str]) -> bool:
    """Return whether the words of a command ask for its help."""
    return any(word in {"-h", "--help"} for word in arguments)


def help_text(command: "Command", parser: ArgumentParser, arguments: Sequence[str]) -> str:
    """Return the help of a command: of its common keys, or of all of them for `--help all`.

    The parser's other descriptions are hidden.
    """
    parser.usage = f"mae-et {command.name} [--config FILE_OR_NAME ...] [--KEY VALUE ...]"
    for group in parser._action_groups:
        if parser.description and parser.description.startswith(group.title or "-"):
            group.title = "keys"  # the title would repeat the description
    kind: Any = command.config
    shown = [action for action in parser._actions if action.dest in _leaves(parser)]
    if not issubclass(kind, RunConfig) or len(shown) <= MOST_KEYS or "all" in arguments:
        return parser.format_help()
    common = {"config", *marked_keys(kind, "common")}
    for action in parser._actions:
        if action.dest not in common:
            action.help = argparse.SUPPRESS
    others = f"the others: mae-et {command.name} --help all"
    parser.epilog = f"{len(common)} of {len(shown)} keys; {others}"
    return parser.format_help()


def _leaves(parser: ArgumentParser) -> set[str]:
    """Return the keys that have values, without sections and --help."""
    names = {action.dest for action in parser._actions if action.option_strings}
    sections = {name.rpartition(".")[0] for name in names}
    return names - sections - {"help", "print_config"}
