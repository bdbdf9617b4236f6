"""Commands that compare runs: a table, an HTML report."""

import shutil
import sys
from typing import Any

from mae_et.cli.arguments import Arguments, config_of
from mae_et.cli.output import prints_results


def compare(arguments: Arguments) -> None:
    """Print the results of several runs as one table: compare RUN... [--output table.md]."""
    config = config_of("compare", arguments)
    from mae_et.monitoring.compare import compare

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(compare(config, width), flush=True)


@prints_results
def report(arguments: Arguments) -> dict[str, Any]:
    """Write an HTML page about runs that opens offline: report RUN... [--output report.html]."""
    config = config_of("report", arguments)
    from mae_et.monitoring.report import report

    return {"report": str(report(config.runs, config.output))}
