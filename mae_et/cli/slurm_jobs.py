"""Commands for SLURM: submit jobs, report the status of runs."""

from typing import Any

from mae_et.cli.arguments import Arguments, config_of
from mae_et.errors import UserError
from slurm.command import CommandLine


def submit(arguments: Arguments) -> None:
    """Submit a command to SLURM, with follow-ups or as a sweep."""
    from slurm.cli import submit_command

    submit_command(command_line(), arguments)


def status(arguments: Arguments) -> None:
    """Show the state of runs: job, step, loss, speed, time left, errors."""
    from slurm.cli import status_command

    status_command(arguments)


def command_line() -> CommandLine:
    """Return the functions with which `slurm` parses and runs commands without importing them."""
    from mae_et.cli.main import run  # which imports this module

    return CommandLine(_config_of, run)


def _config_of(kind: str, arguments: Arguments) -> Any:
    """Return the config of a command; for bench, only `bench node` is supported."""
    if kind != "bench":
        return config_of(kind, arguments)
    if arguments[:1] != ["node"]:
        raise UserError("only the benchmark node can be submitted: mae-et submit bench node ...")
    return config_of("bench node", arguments[1:])
