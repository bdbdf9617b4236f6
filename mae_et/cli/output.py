"""Print results, as a table on a terminal and one line of JSON elsewhere; hints on stderr."""

import json
import sys
from typing import Any

from mae_et.cli.arguments import Arguments
from mae_et.config.schema import OutputConfig
from mae_et.monitoring.figures import results_table
from mae_et.monitoring.run_record import RunRecord
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
    """Print results as JSON or as a table, from rank 0 only."""
    if as_json:
        print_json(results)
    elif is_main():
        print(results_table(results), flush=True)


def results_of(output: OutputConfig) -> dict[str, Any]:
    """Return the results of a finished run on rank 0, and say how to look at its curves."""
    if not is_main():
        return {}
    say(f"curves: {curves_command(output)}")
    return {"run": str(output.dir)} | RunRecord(output.dir).results
