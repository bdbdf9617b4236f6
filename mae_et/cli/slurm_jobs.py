"""Commands for SLURM: submit jobs, report the status of runs."""

from mae_et.cli.arguments import Arguments, config_of
from slurm.command import CommandLine


def submit(arguments: Arguments) -> None:
    """Submit a command to SLURM, with followers or as a sweep."""
    from slurm.cli import submit_command

    submit_command(command_line(), arguments)


def status(arguments: Arguments) -> None:
    """Report the status of runs: job, step, loss, speed, time left, restarts, last error."""
    from slurm.cli import status_command

    status_command(arguments)


def command_line() -> CommandLine:
    """Return what `slurm` needs to parse and run commands, for it imports none of them."""
    from mae_et.cli.main import run  # which imports this module

    return CommandLine(config_of, run)
