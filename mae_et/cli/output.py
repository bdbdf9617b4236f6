"""Print results, as a table on a terminal and one line of JSON elsewhere; hints on stderr."""

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from mae_et.cli.arguments import Arguments
from mae_et.config.schema import OutputConfig
from mae_et.monitoring.figures import results_table
from mae_et.runtime.console import is_main, say
from mae_et.training.opening import curves_command


def print_json(results: dict[str, Any]) -> None:
    """Print results as one line of JSON, from rank 0 only."""
    if is_main():
        print(json.dumps(results), flush=True)


def split_json_flag(arguments: Arguments) -> tuple[Arguments, bool]:
    """Remove `--json` from the arguments of a command that prints results."""
    return [word for word in arguments if word != "--json"], "--json" in arguments


def print_results(results: dict[str, Any], as_json: bool) -> None:
    """Print a table on a terminal, one line of JSON elsewhere or if requested; from rank 0 only."""
    if as_json or not sys.stdout.isatty():
        print_json(results)
    elif is_main():
        print(results_table(results), flush=True)


def prints_results(command: Callable[[Arguments], dict[str, Any]]) -> Callable[[Arguments], None]:
    """Print what a command returns, see `print_results`; it also takes `--json`."""

    @wraps(command)
    def run(arguments: Arguments) -> None:
        arguments, as_json = split_json_flag(arguments)
        print_results(command(arguments), as_json)

    return run


def print_run(output: OutputConfig, further: dict[str, Any], as_json: bool) -> None:
    """Print the results of a finished run, and how to look at its curves; from rank 0 only."""
    if is_main():
        results = json.loads((output.dir / "results.json").read_text())
        say(f"curves: {curves_command(output)}")
        print_results({"run": str(output.dir)} | results | further, as_json)
