"""Commands for SLURM: submit jobs, report the status of runs."""

from mae_et.cli.arguments import Arguments
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
    from mae_et.cli.commands import config_of  # which imports this module
    from mae_et.cli.main import run

    return CommandLine(config_of, run)
