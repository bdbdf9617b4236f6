"""Parse the arguments of a command into its config."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from finetune.config import ClassifierConfig
from mae_et.cli.extension import (
    flags_of_branch,
    flags_of_extension,
    flags_of_resumed_run,
    split_stop,
)
from mae_et.cli.help import help_requested, help_text
from mae_et.cli.inheritance import data_of_checkpoint, inherited_keys
from mae_et.config.data import DataConfig
from mae_et.config.files import add_config_arguments, build_config, parse_given, plain
from mae_et.config.key_checks import unknown_keys
from mae_et.config.schema import PretrainConfig, RunConfig
from mae_et.config.shipped import find_config
from mae_et.config.words import join_config_flags
from mae_et.data.datasets import is_known
from mae_et.errors import UserError, require
from mae_et.runtime.console import say

if TYPE_CHECKING:
    from mae_et.cli.command import Command

Arguments = list[str]


def parse(command: "Command", arguments: Arguments) -> Any:
    """Return the config that the arguments of a command describe.

    A run inherits keys that are not given from its initial weights: fine-tuning without a dataset
    uses the checkpoint's, if the checkpoint names one.
    """
    kind: Any = command.config
    parser, given = _parse_given(command, arguments)
    if not issubclass(kind, RunConfig):
        return build_config(parser, kind, given)
    # One number fits any number of channels, until the statistics are inherited.
    count = len(given.get("data.mean") or given.get("data.std") or "1")
    statistics = {"data.mean": [0.5] * count, "data.std": [0.5] * count}
    config = build_config(parser, kind, given, **statistics)
    if not command.branches:
        refusal = f"{command.name} continues no run: branch_from must be null"
        require(config.continues is None, refusal)
    return build_config(parser, kind, given, **inherited_keys(command.name, config))


def _parse_given(command: "Command", arguments: Arguments) -> tuple[ArgumentParser, Namespace]:
    """Return a command's parser, and the keys of its config that arguments give."""
    parser = parser_of(command)
    kind: Any = command.config
    if help_requested(arguments):
        print(help_text(command, parser, arguments), end="")
        sys.exit(0)
    for key, other in command.keys_of_others.items():
        if any(re.match(rf"--{key}(=|$)", word) for word in arguments):
            raise UserError(f"--{key} is a key of mae-et {other}, not of mae-et {command.name}")
    if command.first == "checkpoint" and arguments and not arguments[0].startswith("-"):
        arguments = [f"--checkpoint={arguments[0]}", *arguments[1:]]
    if issubclass(kind, ClassifierConfig):
        # Every other command calls them --checkpoint and --checkpoint_key.
        pattern = r"^--(checkpoint(?:[_-]key)?)(?==|$)"
        arguments = [re.sub(pattern, r"--model.\1", word) for word in arguments]
    if command.trains:
        arguments = split_stop(arguments)[0]
    if command.branches:
        arguments = flags_of_branch(arguments, kind, writes=command.trains)
    if issubclass(kind, PretrainConfig):
        arguments = [re.sub(r"^--init(?==|$)", "--init.weights", word) for word in arguments]
        arguments = flags_of_extension(arguments)
    if command.first == "run":
        arguments = flags_of_resumed_run(arguments)
    try:
        return parser, parse_given(parser, kind, arguments)
    except UserError as error:
        _refuse_path(command, str(error))
        _refuse_config_of_another_command(command, arguments)
        raise


def _refuse_path(command: "Command", sentence: str) -> None:
    """Refuse a stray path, and name the place where the command expects one."""
    word = re.fullmatch(r"unrecognized arguments: ([^-\s]\S*)", sentence)
    path = Path(word[1]) if word else None
    if path is None or not path.exists():
        return
    is_config = path.suffix in {".yaml", ".yml"}
    where = "a config comes after --config" if is_config else "data come after --data.root"
    if command.first == "checkpoint":
        where = f"the checkpoint comes first ({command.name} RUN ...), and {where}"
    elif command.first == "run" and path.is_dir():
        where = f"{where}, and {path} is not a run folder"
    raise UserError(f"{sentence}; {where}")


def parse_over_data(command: "Command", arguments: Arguments) -> Any:
    """Return a config whose data keys override those that its checkpoint was trained with."""
    kind: Any = command.config
    parser, given = _parse_given(command, arguments)
    config = build_config(parser, kind, given)
    own = None if config.data is None else data_of_checkpoint(config)
    if own is None:
        return config
    if own.source == "synthetic":  # this name would refuse a given data.root
        own = replace(own, name=None)
    if not is_known(own):
        of_run = f"the run's images (data.name {own.name}) are of its own code"
        require(config.data.root or config.data.name, f"{of_run}: give --data.root or --data.name")
        say(f"{of_run}; the given ones are used")
        own = replace(own, name=None, root=None)
    config = build_config(parser, kind, given, data=Namespace(plain(own)))
    data: DataConfig = config.data or own
    if data.source != own.source and data.root == own.root:
        data = replace(data, root=None)  # the root of the run's dataset, not of the requested one
    return replace(config, data=data)


def parser_of(command: "Command") -> ArgumentParser:
    """Return a parser whose arguments are the keys of a command's config."""
    kind: Any = command.config
    name = command.name
    description = (kind.__doc__ or "").strip()
    if issubclass(kind, ClassifierConfig):
        description += " --checkpoint PATH is short for --model.checkpoint PATH."
    if issubclass(kind, PretrainConfig):
        description += " --init PATH is short for --init.weights PATH."
    if command.first == "run":
        description += f" mae-et {name} RUN resumes the run in a folder."
    if command.trains:
        description += f" mae-et {name} --branch-from RUN --output.dir NEW continues a run with "
        description += "other values of optim, curriculum.epochs or seed."
        description += " --stop-after-step N saves and stops after N steps of the whole schedule."
    if name == "pretrain":
        description += " mae-et pretrain RUN --extend-to EPOCHS continues it in a new folder."
    if command.first == "checkpoint":
        description += f" mae-et {name} PATH is short for --checkpoint PATH."
    if command.repeat is not None:
        description += f" mae-et {name} RUN1 RUN2 ... scores several runs."
    parser = ArgumentParser(prog=f"mae-et {name}", exit_on_error=False, description=description)
    add_config_arguments(
        parser,
        kind,
        paths="runs" if command.first == "runs" else None,
        skip=command.keys_of_others,
    )
    return parser


def _refuse_config_of_another_command(command: "Command", arguments: Arguments) -> None:
    """Report a `--config` file that belongs to another command, if that is the mistake."""
    from mae_et.cli.commands import COMMANDS, SUBCOMMANDS  # which import this module

    rows = sorted((*COMMANDS.values(), *SUBCOMMANDS.values()), key=lambda other: not other.trains)
    own: Any = command.config
    for word in join_config_flags(arguments):
        if not word.startswith("--config="):
            continue
        try:
            path = find_config(word.removeprefix("--config="))
            text = path.read_text(encoding="utf-8")
            if not unknown_keys(text, own):
                continue
            others = [row.name for row in rows if row.config and not unknown_keys(text, row.config)]
        except Exception:  # the error that is being handled reports a missing or damaged file
            return
        if others:
            other = path.parent.name if path.parent.name in others else others[0]
            raise UserError(f"{path} is a config of mae-et {other}, not of mae-et {command.name}")
