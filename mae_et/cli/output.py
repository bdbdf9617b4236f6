"""Print results, as a table on a terminal and one line of JSON elsewhere; hints on stderr."""

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from mae_et.cli.arguments import Arguments, config_of
from mae_et.config.schema import OutputConfig
from mae_et.monitoring.figures import results_table
from mae_et.runtime.console import is_main, say
from mae_et.training.opening import curves_command


def print_json(results: dict[str, Any]) -> None:
    """Print results as one line of JSON, from rank 0 only."""
    if is_main():
        print(json.dumps(results), flush=True)


def split_json_flag(arguments: Arguments) -> tuple[Arguments, bool]:
    """Remove `--json` from a command's arguments; return too whether to print JSON.

    JSON is printed if requested, and wherever stdout is not a terminal.
    """
    kept = [word for word in arguments if word != "--json"]
    return kept, "--json" in arguments or not sys.stdout.isatty()


def print_results(results: dict[str, Any], as_json: bool) -> None:
    """Print results as one line of JSON or as a table, from rank 0 only."""
    if as_json:
        print_json(results)
    elif is_main():
        print(results_table(results), flush=True)


def prints_results(
    name: str, parse: Callable[[str, Arguments], Any] = config_of
) -> Callable[[Callable[[Any], dict[str, Any]]], Callable[[Arguments], None]]:
    """Turn a function of a config into a command that parses, runs and prints; adds `--json`."""

    def decorate(run: Callable[[Any], dict[str, Any]]) -> Callable[[Arguments], None]:
        @wraps(run)
        def command(arguments: Arguments) -> None:
            arguments, as_json = split_json_flag(arguments)
            print_results(run(parse(name, arguments)), as_json)

        return command

    return decorate


def print_run(output: OutputConfig, further: dict[str, Any], as_json: bool) -> None:
    """Print the results of a finished run, and how to look at its curves; from rank 0 only."""
    if is_main():
        results = json.loads((output.dir / "results.json").read_text())
        say(f"curves: {curves_command(output)}")
        print_results({"run": str(output.dir)} | results | further, as_json)
