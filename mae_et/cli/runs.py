"""Commands that compare runs: a table, an HTML report, benchmarks."""

import shutil
import sys
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from mae_et.cli.arguments import Arguments, config_of
from mae_et.cli.output import print_json
from mae_et.config.files import add_config_arguments, one_sentence, parse_config
from mae_et.errors import UserError


def compare(arguments: Arguments) -> None:
    """Print the results of several runs as one table: compare RUN... [--output table.md]."""
    config = config_of("compare", arguments)
    from mae_et.monitoring.compare import compare

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(compare(config, width), flush=True)


def report(arguments: Arguments) -> None:
    """Write an HTML page about runs that opens offline: report RUN... [--output report.html]."""
    parser = ArgumentParser(
        prog="mae-et report", exit_on_error=False, description="Write an HTML page about runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="HTML file")
    try:
        given = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(one_sentence(error)) from None
    from mae_et.monitoring.report import report

    print_json({"report": str(report(given.runs, given.output))})


def bench(arguments: Arguments) -> None:
    """Measure speeds: node (what a recipe takes here), step, loader, crop, quality, run."""
    from mae_et.benchmarks.command import BENCHMARKS
    from mae_et.cli.node import bench_node

    if arguments[:1] == ["node"]:
        bench_node(arguments[1:])
        return
    if arguments[:1] in (["-h"], ["--help"]):
        starts = {"node": bench_node} | {name: start for name, (_, start) in BENCHMARKS.items()}
        for name, start in starts.items():
            print(f"  {name:<8}{(start.__doc__ or '').splitlines()[0]}")
        print("\nmae-et bench NAME --help lists its keys.")
        sys.exit(0)
    if not arguments or arguments[0] not in BENCHMARKS:
        raise UserError(f"bench needs one of {', '.join(['node', *BENCHMARKS])}")
    kind, measure = BENCHMARKS[arguments[0]]
    description = (kind.__doc__ or "").strip()
    parser = ArgumentParser(
        prog=f"mae-et bench {arguments[0]}", exit_on_error=False, description=description
    )
    add_config_arguments(parser, kind)
    config, _ = parse_config(parser, kind, arguments[1:])
    print_json(measure(config))
